# What every op does before its launch: each array checked as it is named, all held against overlap, outputs allocated.
# The wording is the CPU backend's.

cdef enum:
    MAX_OPERANDS = 14


@cython.final
@cython.freelist(8)
cdef class Operands:
    """The arrays of one call of one op, as pointers into device memory.

    An op names its inputs, then its outputs, then calls `done`; nothing is enqueued before. The first float array
    decides the type of the call, float32 or bfloat16, which inp and out then ask of all others; inp32 and out32 are
    for statistics, losses and the optimizer's state, which are float32 in either.
    """
    cdef str op
    cdef int type           # of the call; -1 until a float array was seen
    cdef int count
    cdef list names
    cdef list may_be
    cdef uintptr_t start[MAX_OPERANDS]
    cdef uintptr_t stop[MAX_OPERANDS]
    cdef bint written[MAX_OPERANDS]

    def __cinit__(self, str op):
        self.op = op
        self.type = -1
        self.count = 0
        self.names = []
        self.may_be = []

    cdef object error(self, str text):
        return ValueError(f"{self.op}: {text}")

    cdef tuple shape(self, str name, object array, int min_ndim=1, int max_ndim=32):
        """The shape of an input that decides the sizes; never empty. A float input decides the type too."""
        if not isinstance(array, DeviceArray):
            raise self.error(f"{name} must be a DeviceArray, got {type(array).__name__}")
        cdef tuple shape = (<DeviceArray> array).shape
        cdef int ndim = len(shape)
        if ndim < min_ndim or ndim > max_ndim:
            wanted = f"{min_ndim}" if min_ndim == max_ndim else f"at least {min_ndim}"
            raise self.error(f"{name} must have {wanted} dimension{'' if wanted.endswith('1') else 's'}, "
                             f"got shape {shape}")
        if 0 in shape:
            raise self.error(f"{name} is empty: its shape is {shape}")
        if self.type < 0 and (<DeviceArray> array).type != INT32:
            self.type = (<DeviceArray> array).type
        return shape

    cdef void* add(self, str name, object array, tuple shape, int wanted, bint written, tuple may_be) except? NULL:
        if not isinstance(array, DeviceArray):
            raise self.error(f"{name} must be a DeviceArray of {TYPE_NAMES[wanted]}, got {type(array).__name__}")
        cdef DeviceArray operand = array
        if operand.type != wanted:
            raise self.error(f"{name} must be {TYPE_NAMES[wanted]}, got {operand.dtype}")
        if operand.shape != shape:
            raise self.error(f"{name} must have shape {shape}, got {operand.shape}")
        cdef int i = self.count
        self.names.append(name)
        self.start[i] = <uintptr_t> operand.data
        self.stop[i] = <uintptr_t> operand.data + <uintptr_t> operand.size * ITEM_BYTES[wanted]
        self.written[i] = written
        self.may_be.append(may_be)
        self.count = i + 1
        if written:
            operand.range = None
        return operand.data

    cdef DType dtype(self) except *:
        """The type of the call; float32 where no float array was named yet."""
        return FLOAT32 if self.type < 0 else <DType> self.type

    cdef const void* inp(self, str name, object array, tuple shape) except? NULL:
        if self.type < 0 and isinstance(array, DeviceArray) and (<DeviceArray> array).type != INT32:
            self.type = (<DeviceArray> array).type
        return self.add(name, array, shape, self.dtype(), False, None)

    cdef const float* inp32(self, str name, object array, tuple shape) except? NULL:
        return <const float*> self.add(name, array, shape, FLOAT32, False, None)

    cdef const int32_t* ints(self, str name, object array, tuple shape, Py_ssize_t limit,
                             bint allow_ignored=False) except? NULL:
        """An int32 input whose values must lie in [0, limit); -1 is let through where it means "not counted".

        Checked where from_host noted the range of what it copied; a kernel must be safe, not right, for other values.
        """
        cdef const int32_t* data = <const int32_t*> self.add(name, array, shape, INT32, False, None)
        cdef DeviceArray operand = array
        if operand.range is None:
            return data
        low, low_at, high, high_at = operand.range
        wrong = (low, low_at) if low < (-1 if allow_ignored else 0) else (high, high_at) if high >= limit else None
        if wrong is not None:
            raise self.error(f"{name}{index_in(shape, wrong[1])} is {wrong[0]}, but must lie in 0..{limit - 1}"
                             + (" or be -1 (not counted)" if allow_ignored else ""))
        return data

    cdef void* out(self, str name, object array, tuple shape, tuple may_be=None) except? NULL:
        """An output. `may_be` names operands that it may be identical to; any other overlap is an error."""
        return self.add(name, array, shape, self.dtype(), True, may_be)

    cdef float* out32(self, str name, object array, tuple shape, tuple may_be=None) except? NULL:
        return <float*> self.add(name, array, shape, FLOAT32, True, may_be)

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

    # ---- outputs: the caller's, or new ones

    cdef object given(self, object array, tuple shape):
        return new_array(shape, self.dtype()) if array is None else array

    cdef object given32(self, object array, tuple shape):
        return new_array(shape, FLOAT32) if array is None else array

    cdef object given_gradient(self, object array, tuple shape, bint accumulate):
        """The caller's gradient of a parameter, or a new one: of zeros where it will be added to."""
        if array is None and accumulate:
            return zeros(shape, TYPE_NAMES[self.dtype()])
        return self.given(array, shape)


cdef inline Py_ssize_t product(tuple shape):
    cdef Py_ssize_t n = 1
    for size in shape:
        n *= <Py_ssize_t> size
    return n
