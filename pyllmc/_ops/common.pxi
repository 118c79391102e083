# What every op needs before its arithmetic: the number of threads, scratch memory, and checked operands.
# Included first into each ISA module.

cimport cython
from cpython.buffer cimport PyBUF_ND, PyBuffer_Release, PyObject_GetBuffer
from cython.parallel cimport parallel, prange, threadid
from libc.stdlib cimport free
from libc.stdint cimport int32_t, uintptr_t
from libc.string cimport memcpy, memset
from posix.stdlib cimport posix_memalign

from pyllmc._ops.simd cimport *

from numbers import Integral

import numpy

# empty and zeros are used here, all of them belong to every backend
from pyllmc._ops.memory import empty, from_host, recorder, synchronize, to_host, zeros
from pyllmc.parts import check_parts as _check_parts

# ---- threads --------------------------------------------------------------------------------------------------------

cdef enum:
    MAX_THREADS = 1024
    PARALLEL_FROM = 20000   # floats or multiplications: a parallel region costs about as much as half of them

cdef int thread_cap = 0     # the container's share of the processors, 1 in a forked child, 0 where there is no cap


# From Python's integers only to Py_ssize_t: what Cython before 3.3 writes for any other type of C calls itself, and where
# every inline function has to be inlined (setup.py) gcc refuses that.
def limit_threads(Py_ssize_t cap):
    """Never use more than `cap` threads, whatever OpenMP says; 0 lifts the cap. Called by pyllmc._ops.isa."""
    global thread_cap
    thread_cap = <int> cap


def get_num_threads() -> int:
    """Threads that the next op may use: OpenMP's count now (OMP_NUM_THREADS, affinity, threadpoolctl), capped by the
    container's share."""
    return threads()


def set_num_threads(num_threads) -> None:
    """Threads for the ops called from this Python thread from now on (the same as omp_set_num_threads).

    Raises ValueError outside 1..1024: no machine gains from more, and OpenMP ends the process that asks for too many.
    """
    if not isinstance(num_threads, Integral) or not 1 <= num_threads <= MAX_THREADS:
        raise ValueError(f"set_num_threads: the number of threads must lie in 1..{MAX_THREADS}, got {num_threads}")
    cdef Py_ssize_t wanted = num_threads
    set_omp_threads(<int> wanted)


cdef inline int threads() noexcept:
    cdef int n = omp_threads()
    if thread_cap > 0 and n > thread_cap:
        n = thread_cap
    if n > MAX_THREADS:
        n = MAX_THREADS
    return n if n > 1 else 1


cdef inline int team(double work, Py_ssize_t items) noexcept:
    """Threads for `items` independent pieces of `work` floats (or multiplications) in all. The split never changes a
    result, so this is a matter of speed alone."""
    cdef int n = threads()
    if work < PARALLEL_FROM:
        return 1
    if n > items:
        n = <int> items
    return n if n > 1 else 1


# ---- scratch --------------------------------------------------------------------------------------------------------
# Working memory belongs to the call, so that several Python threads can run ops at once; blocks go back to a small
# pool, so that a training step allocates nothing after the first. The pool is touched under the GIL only.

cdef enum:
    POOL = 8

cdef struct Block:
    char* data
    size_t size

cdef Block pool[POOL]


@cython.final
@cython.freelist(8)
cdef class Scratch:
    """`count` floats, 64-byte aligned, contents undefined; returned to the pool when the object goes."""
    cdef Block block

    def __cinit__(self, Py_ssize_t count):
        cdef size_t size = <size_t> (count if count > 0 else 1) * sizeof(float) + 64
        cdef void* data = NULL
        cdef int i, best = -1
        for i in range(POOL):
            if pool[i].size >= size and (best < 0 or pool[i].size < pool[best].size):
                best = i
        if best >= 0:
            self.block = pool[best]
            pool[best].data = NULL
            pool[best].size = 0
            return
        if posix_memalign(&data, 64, size):
            raise MemoryError(f"no memory for {size} bytes of scratch")
        self.block.data = <char*> data
        self.block.size = size

    def __dealloc__(self):
        cdef int i, smallest = 0
        for i in range(1, POOL):
            if pool[i].size < pool[smallest].size:
                smallest = i
        if pool[smallest].size < self.block.size:
            free(pool[smallest].data)
            pool[smallest] = self.block
        else:
            free(self.block.data)

    cdef float* floats(self) noexcept:
        return <float*> self.block.data


# ---- operands -------------------------------------------------------------------------------------------------------

cdef enum:
    MAX_OPERANDS = 12
    ALIGNED_FROM = 16384    # floats of a new array


cdef object float32 = numpy.dtype("float32")
cdef object int32 = numpy.dtype("int32")
cdef object ndarray = numpy.ndarray


@cython.final
@cython.freelist(8)
cdef class Operands:
    """The arrays of one call of one op: each checked as it is named, all held against overlap by `done`.

    An op names its inputs (`inp`, `ints`), then its outputs (`out`), then calls `done`; nothing is written before.
    The pointers stay good for the length of the call, because the caller's arguments hold the arrays, and numpy
    does not resize an array that is referenced.
    """
    cdef str op
    cdef int count
    cdef list names
    cdef list may_be
    cdef list copies        # of inputs: held for the length of the call
    cdef uintptr_t start[MAX_OPERANDS]
    cdef uintptr_t stop[MAX_OPERANDS]
    cdef bint written[MAX_OPERANDS]

    def __cinit__(self, str op):
        self.op = op
        self.count = 0
        self.names = []
        self.may_be = []
        self.copies = []

    cdef object error(self, str text):
        return ValueError(f"{self.op}: {text}")

    cdef tuple shape(self, str name, object array, int min_ndim=1, int max_ndim=32):
        """The shape of an input that decides the sizes; never empty."""
        if not isinstance(array, ndarray):
            raise self.error(f"{name} must be a numpy array, got {type(array).__name__}")
        cdef tuple shape = array.shape
        cdef int ndim = len(shape)
        if ndim < min_ndim or ndim > max_ndim:
            wanted = f"{min_ndim}" if min_ndim == max_ndim else f"at least {min_ndim}"
            raise self.error(f"{name} must have {wanted} dimension{'' if wanted.endswith('1') else 's'}, "
                             f"got shape {shape}")
        if 0 in shape:
            raise self.error(f"{name} is empty: its shape is {shape}")
        return shape

    cdef void* add(self, str name, object array, tuple shape, object dtype, bint written, tuple may_be) except NULL:
        if not isinstance(array, ndarray):
            raise self.error(f"{name} must be a numpy array of {dtype.name}, got {type(array).__name__}")
        if array.dtype is not dtype and array.dtype != dtype:
            raise self.error(f"{name} must be {dtype.name}, got {array.dtype}")
        if shape is not None and array.shape != shape:
            raise self.error(f"{name} must have shape {shape}, got {array.shape}")
        cdef object flags = array.flags
        if not flags.c_contiguous:
            raise self.error(f"{name} must be in C order without gaps; numpy.ascontiguousarray makes it so")
        if not flags.aligned:
            raise self.error(f"{name} must be aligned to its item size")
        if written and not flags.writeable:
            raise self.error(f"{name} is an output but read-only")
        cdef Py_buffer buffer
        PyObject_GetBuffer(array, &buffer, PyBUF_ND)
        cdef void* data = buffer.buf
        cdef int i = self.count
        self.names.append(name)
        self.start[i] = <uintptr_t> data
        self.stop[i] = <uintptr_t> data + <uintptr_t> buffer.len
        self.written[i] = written
        self.may_be.append(may_be)
        self.count = i + 1
        PyBuffer_Release(&buffer)
        return data

    cdef const float* inp(self, str name, object array, tuple shape) except NULL:
        return <const float*> self.add(name, array, shape, float32, False, None)

    cdef const int32_t* ints(self, str name, object array, tuple shape, Py_ssize_t limit,
                             bint allow_ignored=False) except NULL:
        """An int32 input whose values must lie in [0, limit); -1 is let through where it means "not counted".

        What is checked and used is a copy: another thread may write to the array while the op runs without the GIL.
        """
        self.add(name, array, shape, int32, False, None)
        cdef object copy = array.copy()
        self.copies.append(copy)
        cdef Py_buffer buffer
        PyObject_GetBuffer(copy, &buffer, PyBUF_ND)
        cdef const int32_t* data = <const int32_t*> buffer.buf
        cdef Py_ssize_t i, n = buffer.len // <Py_ssize_t> sizeof(int32_t)
        PyBuffer_Release(&buffer)
        cdef Py_ssize_t lowest = -1 if allow_ignored else 0
        for i in range(n):
            if data[i] < lowest or data[i] >= limit:
                index = tuple([int(k) for k in numpy.unravel_index(i, shape)])
                raise self.error(f"{name}{list(index)} is {data[i]}, but must lie in 0..{limit - 1}"
                                 + (" or be -1 (not counted)" if allow_ignored else ""))
        return data

    cdef float* out(self, str name, object array, tuple shape, tuple may_be=None) except NULL:
        """An output. `may_be` names operands that it may be identical to; any other overlap is an error."""
        return <float*> self.add(name, array, shape, float32, True, may_be)

    cdef int done(self) except -1:
        cdef int i, j
        for i in range(self.count):
            if not self.written[i]:
                continue
            for j in range(self.count):
                if i == j or self.start[i] >= self.stop[j] or self.start[j] >= self.stop[i]:
                    continue
                if self.start[i] == self.start[j] and self.stop[i] == self.stop[j]:
                    if self.may_be[i] is not None and self.names[j] in self.may_be[i]:
                        continue
                    if self.may_be[j] is not None and self.names[i] in self.may_be[j]:
                        continue
                raise self.error(f"{self.names[i]} overlaps {self.names[j]} in memory")
        return 0


cdef inline Py_ssize_t product(tuple shape):
    cdef Py_ssize_t n = 1
    for size in shape:
        n *= <Py_ssize_t> size
    return n


cdef inline object given(object array, tuple shape):
    """The caller's output, or a new one: aligned where that is worth the time that it takes."""
    if array is not None:
        return array
    return empty(shape) if product(shape) >= ALIGNED_FROM else numpy.empty(shape, float32)


cdef inline object given_gradient(object array, tuple shape, bint accumulate):
    """The caller's gradient of a parameter, or a new one: of zeros where it will be added to."""
    return zeros(shape) if array is None and accumulate else given(array, shape)


cdef inline Py_ssize_t ceil_div(Py_ssize_t n, Py_ssize_t d) noexcept nogil:
    return (n + d - 1) // d


cdef inline Py_ssize_t round_up(Py_ssize_t n, Py_ssize_t multiple) noexcept nogil:
    return ceil_div(n, multiple) * multiple


cdef inline Py_ssize_t smaller(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return a if a < b else b


cdef inline Py_ssize_t larger(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return a if a > b else b


# ---- what ops share --------------------------------------------------------------------------------------------------

cdef enum:
    STRIP = 8192    # floats of an elementwise op handled as one item: 32 KiB
    LINE = 16       # floats of a cache line


cdef inline Py_ssize_t strips(Py_ssize_t n) noexcept nogil:
    return ceil_div(n, STRIP)


cdef inline vfloat load_some(const float* p, Py_ssize_t n) noexcept nogil:
    return vload(p) if n == W else vload_n(p, n)


cdef inline void store_some(float* p, vfloat v, Py_ssize_t n) noexcept nogil:
    if n == W:
        vstore(p, v)
    else:
        vstore_n(p, v, n)


cdef enum:
    STREAMED = 4194304  # floats, 16 MiB, more than a core's share of the last cache


cdef inline bint past_caches(const float* out, Py_ssize_t size, Py_ssize_t row) noexcept:
    """Whether `size` floats at out, which nobody has just read, are better written past the caches (put, and
    vstream_end by each thread): they would have left them before anyone reads them, and their lines need not be fetched
    first. Vectors begin every W floats of a row; none may lie in two lines."""
    return size >= STREAMED and row % W == 0 and <size_t> out % (W * sizeof(float)) == 0


cdef inline void put(float* p, vfloat v, Py_ssize_t n, bint stream) noexcept nogil:
    """store_some, with `stream` past the caches."""
    if stream and n == W:
        vstream(p, v)
    else:
        store_some(p, v, n)


cdef void add_partials(const float* partial, Py_ssize_t chunks, Py_ssize_t columns, float* out,
                       bint accumulate) noexcept nogil:
    """out[j] (+)= sum over chunks of partial[chunk, j], in order."""
    cdef Py_ssize_t j = 0, c, n
    cdef vfloat x
    while j < columns:
        n = smaller(W, columns - j)
        x = load_some(partial + j, n)
        for c in range(1, chunks):
            x = vadd(x, load_some(partial + c * columns + j, n))
        if accumulate:
            x = vadd(load_some(out + j, n), x)
        store_some(out + j, x, n)
        j += W
