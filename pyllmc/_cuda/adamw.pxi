# The optimizer's two passes over memory: the norm of the gradient, and the update. adamw.cu computes.


def adamw_update(param, grad, m, v, *, learning_rate, beta1, beta2, eps, weight_decay, step, grad_scale=1.0,
                 master=None, seed=0):
    """g = grad_scale grad,  m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,
    param = param - learning_rate (m' / (sqrt(v') + eps) + weight_decay param),  m' = m / (1 - beta1^step), v' likewise

    param, grad: float32 or bfloat16, one shape. m, v: float32 of this shape. master: None or, for bfloat16, the
    parameters in float32, which are then updated in param's place and rounded to it. param, m, v and master are updated
    in place, grad is only read. step counts from 1. A bfloat16 param is rounded up or down at random, with the
    probabilities that keep it right on average; the choice depends on seed and the element's index alone.
    Returns None. Raises ValueError for a wrong shape, dtype or overlap, for step < 1, for a beta outside [0, 1), and for
    the master of a float32 param, which is its own. One pass over memory, 16 bytes of param to a thread.
    Source: Loshchilov & Hutter (2019), arXiv 1711.05101; llm.c llmc/adamw.cuh.
    """
    cdef Operands arrays = Operands("adamw_update")
    cdef tuple shape = arrays.shape("param", param, 0)
    if step < 1:
        raise arrays.error(f"step counts from 1, got {step}")
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise arrays.error(f"beta1 and beta2 must lie in [0, 1), got {beta1} and {beta2}")
    cdef void* w = arrays.out("param", param, shape)
    if master is not None and arrays.dtype() == FLOAT32:
        raise arrays.error("master must be None: float32 parameters are their own master copy")
    cdef const void* g = arrays.inp("grad", grad, shape)
    cdef float* mean = arrays.out32("m", m, shape)
    cdef float* square = arrays.out32("v", v, shape)
    cdef float* exact = arrays.out32("master", master, shape) if master is not None else NULL
    arrays.done()
    cdef kernels.AdamW o
    o.one_minus_beta1, o.one_minus_beta2, o.beta2 = 1.0 - beta1, 1.0 - beta2, beta2
    o.eps, o.grad_scale = eps, grad_scale
    o.step_size = learning_rate / (1.0 - beta1 ** step)
    o.root_scale = 1.0 / (1.0 - beta2 ** step) ** 0.5
    o.decay = learning_rate * weight_decay
    o.seed = seed & 0xffffffffffffffff
    kernels.adamw_update(arrays.dtype(), w, g, mean, square, exact, product(shape), o)


def global_norm(array, *, out=None):
    """out = sqrt(sum of array^2)

    array: float32 or bfloat16, any shape. out: float32 (), overwritten. Returns out.
    Squares and sums are float64: no overflow, no lost small terms. Split over up to 1024 blocks, whatever the GPU, whose
    sums are added in a fixed order. Raises ValueError for a wrong shape, dtype or overlap.
    Source: llm.c llmc/global_norm.cuh.
    """
    cdef Operands arrays = Operands("global_norm")
    cdef tuple shape = arrays.shape("array", array, 0)
    out = arrays.given32(out, ())
    cdef const void* x = arrays.inp("array", array, shape)
    cdef float* norm = arrays.out32("out", out, ())
    arrays.done()
    kernels.global_norm(arrays.dtype(), x, norm, product(shape))
    return out
