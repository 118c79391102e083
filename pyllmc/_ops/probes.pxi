# What is not an op: the arithmetic peak of this machine, and the vector functions laid open for tests.

import time


cdef enum:
    CHAINS = 12         # independent chains of FMAs: latency 4 x 2 units, and room


cdef float fma_chains(Py_ssize_t rounds) noexcept nogil:
    """rounds * CHAINS * W multiply-adds in registers. The sum is used, so that no compiler drops the chains."""
    cdef vfloat chain[CHAINS]
    cdef vfloat a = vset1(0.9999), b = vset1(0.0001)
    cdef Py_ssize_t i, k
    for i in range(CHAINS):
        chain[i] = vset1(<float> i)
    for k in range(rounds):
        for i in range(CHAINS):
            chain[i] = vfma(chain[i], a, b)
    for i in range(1, CHAINS):
        chain[0] = vadd(chain[0], chain[i])
    return vreduce_add(chain[0])


def fma_peak(seconds=0.2) -> float:
    """GFLOP/s of register-only multiply-adds on all threads: the roof over every product.

    The best of repeated short runs within about `seconds`. A machine that others use gives less than it could.
    """
    cdef Py_ssize_t rounds = 1000000
    cdef int t = threads(), i
    cdef Scratch scratch = Scratch(16 * t)
    cdef float* sums = scratch.floats()
    cdef double best = 0.0
    stop = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        for i in prange(t, nogil=True, num_threads=t, schedule="static"):
            sums[16 * i] = fma_chains(rounds)
        now = time.perf_counter()
        best = max(best, 2.0 * CHAINS * W * rounds * t / (now - start) / 1e9)
        if now >= stop:
            return best


def _vector_exp(inp, *, out=None):
    """out = e^inp, at most 1.1 ulp off. float32, any shape. For tests."""
    cdef Operands arrays = Operands("_vector_exp")
    cdef tuple shape = arrays.shape("inp", inp, 0)
    out = given(out, shape)
    cdef const float* x = arrays.inp("inp", inp, shape)
    cdef float* y = arrays.out("out", out, shape)
    cdef Py_ssize_t i = 0, n = product(shape)
    while i < n:
        store_some(y + i, vexp(load_some(x + i, smaller(W, n - i))), smaller(W, n - i))
        i += W
    return out


def _vector_log(inp, *, out=None):
    """out = ln inp, at most 2 ulp off. float32, any shape. For tests."""
    cdef Operands arrays = Operands("_vector_log")
    cdef tuple shape = arrays.shape("inp", inp, 0)
    out = given(out, shape)
    cdef const float* x = arrays.inp("inp", inp, shape)
    cdef float* y = arrays.out("out", out, shape)
    cdef Py_ssize_t i = 0, n = product(shape)
    while i < n:
        store_some(y + i, vlog(load_some(x + i, smaller(W, n - i))), smaller(W, n - i))
        i += W
    return out
