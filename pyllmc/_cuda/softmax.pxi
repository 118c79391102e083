# Softmax and cross-entropy, row by row over the vocabulary; softmax.cu computes.


cdef size_t counted_columns(Operands arrays, object vocab_size, Py_ssize_t columns) except 0:
    if vocab_size is None:
        return columns
    if not 1 <= vocab_size <= columns:
        raise arrays.error(f"vocab_size must lie in 1..{columns}, got {vocab_size}")
    return vocab_size


def softmax_forward(inp, *, vocab_size=None, out=None):
    """out = e^inp / sum of e^inp, over the first vocab_size columns of the last axis; the others are 0

    inp: float32 or bfloat16 (..., Vp). vocab_size: V <= Vp, all columns by default. out: (..., Vp), overwritten; it may
    be inp. Returns out. Backward needs out. Raises ValueError for a wrong shape, dtype or overlap, and for a vocab_size
    outside 1..Vp. A block for each row; the row's maximum is subtracted first. Source: arXiv 1805.02867.
    """
    cdef Operands arrays = Operands("softmax_forward")
    cdef tuple shape = arrays.shape("inp", inp)
    cdef size_t Vp = shape[-1], V = counted_columns(arrays, vocab_size, Vp), rows = product(shape) // Vp
    out = arrays.given(out, shape)
    cdef const void* x = arrays.inp("inp", inp, shape)
    cdef void* y = arrays.out("out", out, shape, ("inp",))
    arrays.done()
    kernels.softmax_forward(arrays.dtype(), x, y, rows, V, Vp)
    return out


def softmax_backward(dout, out, *, vocab_size=None, dinp=None):
    """dinp = out (dout - sum of dout out), over the first vocab_size columns; the others are 0

    dout, out: float32 or bfloat16 (..., Vp), out from softmax_forward. dinp: (..., Vp), overwritten; it may be dout.
    Returns dinp. Raises ValueError for a wrong shape, dtype or overlap, and for a vocab_size outside 1..Vp.
    A block for each row. Source: the derivative of softmax_forward.
    """
    cdef Operands arrays = Operands("softmax_backward")
    cdef tuple shape = arrays.shape("out", out)
    cdef size_t Vp = shape[-1], V = counted_columns(arrays, vocab_size, Vp), rows = product(shape) // Vp
    dinp = arrays.given(dinp, shape)
    cdef const void* dy = arrays.inp("dout", dout, shape)
    cdef const void* y = arrays.inp("out", out, shape)
    cdef void* dx = arrays.out("dinp", dinp, shape, ("dout",))
    arrays.done()
    kernels.softmax_backward(arrays.dtype(), dy, y, dx, rows, V, Vp)
    return dinp


def crossentropy_forward(logits, targets, *, vocab_size=None, losses=None, lse=None):
    """losses = lse - logits[target],  lse = log sum exp of the first vocab_size logits

    logits: float32 or bfloat16 (..., Vp). targets: int32 (...), in 0..V-1, or -1: not counted, loss 0.
    losses, lse: float32 (...), overwritten, in nats. Returns losses, lse. Backward needs logits, targets and lse.
    Raises ValueError for a wrong shape, dtype or overlap, and for a target or vocab_size out of range.
    A block for each row, which it reads once. Source: llm.c llmc/fused_classifier.cuh, from logits alone.
    """
    cdef Operands arrays = Operands("crossentropy_forward")
    cdef tuple shape = arrays.shape("logits", logits), row_shape = shape[:-1]
    cdef size_t Vp = shape[-1], V = counted_columns(arrays, vocab_size, Vp), rows = product(row_shape)
    losses, lse = arrays.given32(losses, row_shape), arrays.given32(lse, row_shape)
    cdef const void* x = arrays.inp("logits", logits, shape)
    cdef const int32_t* wanted = arrays.ints("targets", targets, row_shape, V, True)
    cdef float* loss = arrays.out32("losses", losses, row_shape)
    cdef float* log_sum = arrays.out32("lse", lse, row_shape)
    arrays.done()
    kernels.crossentropy_forward(arrays.dtype(), x, wanted, loss, log_sum, rows, V, Vp)
    return losses, lse


def crossentropy_backward(dlosses, logits, targets, lse, *, vocab_size=None, dlogits=None):
    """dlogits = (softmax(logits) - onehot(target)) dlosses; 0 for rows not counted and for padding columns

    dlosses, lse: float32 (...). logits: float32 or bfloat16 (..., Vp). targets: int32 (...). lse from
    crossentropy_forward. dlogits: (..., Vp), overwritten; it may be logits. Returns dlogits.
    Raises ValueError for a wrong shape, dtype or overlap, and for a target or vocab_size out of range.
    A block for each row. Source: llm.c llmc/fused_classifier.cuh.
    """
    cdef Operands arrays = Operands("crossentropy_backward")
    cdef tuple shape = arrays.shape("logits", logits), row_shape = shape[:-1]
    cdef size_t Vp = shape[-1], V = counted_columns(arrays, vocab_size, Vp), rows = product(row_shape)
    dlogits = arrays.given(dlogits, shape)
    cdef const float* dloss = arrays.inp32("dlosses", dlosses, row_shape)
    cdef const void* x = arrays.inp("logits", logits, shape)
    cdef const int32_t* wanted = arrays.ints("targets", targets, row_shape, V, True)
    cdef const float* log_sum = arrays.inp32("lse", lse, row_shape)
    cdef void* dx = arrays.out("dlogits", dlogits, shape, ("logits",))
    arrays.done()
    kernels.crossentropy_backward(arrays.dtype(), dloss, x, wanted, log_sum, dx, rows, V, Vp)
    return dlogits


def mean_loss(losses, targets, *, out=None):
    """out = sum of losses over the counted targets / their number; 0 where none is counted

    losses: float32 (...). targets: int32 (...); -1 is not counted. out: float32 (), overwritten, in nats.
    Returns out; float(out) fetches it. The sum is kept in float64, by one block, in a fixed order.
    Raises ValueError for a wrong shape, dtype or overlap.
    Source: the mean of llm.c train_gpt2.cu gpt2_backward_and_reduce, over counted positions.
    """
    cdef Operands arrays = Operands("mean_loss")
    cdef tuple shape = arrays.shape("losses", losses, 0)
    out = arrays.given32(out, ())
    cdef const float* loss = arrays.inp32("losses", losses, shape)
    cdef const int32_t* wanted = arrays.ints("targets", targets, shape, 2147483647, True)
    cdef float* mean = arrays.out32("out", out, ())
    arrays.done()
    kernels.mean_loss(loss, wanted, mean, product(shape))
    return out
