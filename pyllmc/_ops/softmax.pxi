# Softmax and cross-entropy, row by row over the vocabulary. Padding columns (from vocab_size on) take no part.


cdef inline void row_statistics(const float* x, Py_ssize_t V, float* top, float* total) noexcept nogil:
    """top = max x, total = sum of e^(x - top)."""
    cdef Py_ssize_t j = 0, full = V // W * W
    cdef vfloat peak = vset1(x[0]), sum = vset1(0.0)
    while j < full:
        peak = vmax(peak, vload(x + j))
        j += W
    if j < V:       # the lanes past the end take the peak itself
        peak = vmax(peak, vfrom_lane(peak, V - j, vload_n(x + j, V - j)))
    top[0] = vreduce_max(peak)
    peak = vset1(top[0])
    j = 0
    while j < full:
        sum = vadd(sum, vexp(vsub(vload(x + j), peak)))
        j += W
    if j < V:
        sum = vadd(sum, vkeep_n(vexp(vsub(vload_n(x + j, V - j), peak)), V - j))
    total[0] = vreduce_add(sum)


cdef inline float row_lse(const float* x, Py_ssize_t V) noexcept nogil:
    cdef float top, total, value
    row_statistics(x, V, &top, &total)
    vstore_n(&value, vadd(vset1(top), vlog(vset1(total))), 1)
    return value


cdef void softmax_row(const float* x, float* out, Py_ssize_t V, Py_ssize_t Vp) noexcept nogil:
    cdef float top, total
    cdef Py_ssize_t j = 0, n
    cdef vfloat peak, factor
    row_statistics(x, V, &top, &total)
    peak = vset1(top)
    factor = vdiv(vset1(1.0), vset1(total))
    while j < V:
        n = smaller(W, V - j)
        store_some(out + j, vmul(vexp(vsub(load_some(x + j, n), peak)), factor), n)
        j += W
    memset(out + V, 0, (Vp - V) * sizeof(float))


cdef void softmax_backward_row(const float* dout, const float* out, float* dinp, Py_ssize_t V,
                               Py_ssize_t Vp) noexcept nogil:
    cdef Py_ssize_t j = 0, n
    cdef vfloat dot = vset1(0.0)
    while j < V:
        n = smaller(W, V - j)
        dot = vfma(load_some(dout + j, n), load_some(out + j, n), dot)
        j += W
    dot = vset1(vreduce_add(dot))
    j = 0
    while j < V:
        n = smaller(W, V - j)
        store_some(dinp + j, vmul(load_some(out + j, n), vsub(load_some(dout + j, n), dot)), n)
        j += W
    memset(dinp + V, 0, (Vp - V) * sizeof(float))


cdef void crossentropy_backward_row(const float* x, float* dx, Py_ssize_t V, Py_ssize_t Vp, int32_t target, float lse,
                                    float scale) noexcept nogil:
    """dx = (e^(x - lse) - onehot(target)) scale; nothing for a target that is not counted."""
    cdef Py_ssize_t j = 0, n
    cdef vfloat minus = vset1(-lse), factor = vset1(scale)
    if target < 0:
        memset(dx, 0, Vp * sizeof(float))
        return
    while j < V:
        n = smaller(W, V - j)
        store_some(dx + j, vmul(vexp(vadd(load_some(x + j, n), minus)), factor), n)
        j += W
    dx[target] -= scale
    memset(dx + V, 0, (Vp - V) * sizeof(float))


cdef Py_ssize_t counted_columns(Operands arrays, object vocab_size, Py_ssize_t columns) except -1:
    if vocab_size is None:
        return columns
    if not 1 <= vocab_size <= columns:
        raise arrays.error(f"vocab_size must lie in 1..{columns}, got {vocab_size}")
    return vocab_size


def softmax_forward(inp, *, vocab_size=None, out=None):
    """out = e^inp / sum of e^inp, over the first vocab_size columns of the last axis; the others are 0

    inp: float32 (..., Vp). vocab_size: V <= Vp, all columns by default. out: float32 (..., Vp), overwritten; it may be
    inp. Returns out. Backward needs out. Raises ValueError for a wrong shape, dtype, order or overlap, and for a
    vocab_size outside 1..Vp.
    Split over rows; the row's maximum is subtracted first. Source: llm.c train_gpt2.c softmax_forward.
    """
    cdef Operands arrays = Operands("softmax_forward")
    cdef tuple shape = arrays.shape("inp", inp)
    cdef Py_ssize_t Vp = shape[-1], V = counted_columns(arrays, vocab_size, Vp), rows = product(shape) // Vp, i
    out = given(out, shape)
    cdef const float* x = arrays.inp("inp", inp, shape)
    cdef float* y = arrays.out("out", out, shape, ("inp",))
    arrays.done()
    cdef int t = team(10.0 * rows * Vp, rows)
    for i in prange(rows, nogil=True, num_threads=t, schedule="static"):
        softmax_row(x + i * Vp, y + i * Vp, V, Vp)
    return out


def softmax_backward(dout, out, *, vocab_size=None, dinp=None):
    """dinp = out (dout - sum of dout out), over the first vocab_size columns; the others are 0

    dout, out: float32 (..., Vp), out from softmax_forward. dinp: float32 (..., Vp), overwritten; it may be dout.
    Returns dinp. Raises ValueError for a wrong shape, dtype, order or overlap, and for a vocab_size outside 1..Vp.
    Split over rows. Source: the derivative of softmax_forward.
    """
    cdef Operands arrays = Operands("softmax_backward")
    cdef tuple shape = arrays.shape("out", out)
    cdef Py_ssize_t Vp = shape[-1], V = counted_columns(arrays, vocab_size, Vp), rows = product(shape) // Vp, i
    dinp = given(dinp, shape)
    cdef const float* dy = arrays.inp("dout", dout, shape)
    cdef const float* y = arrays.inp("out", out, shape)
    cdef float* dx = arrays.out("dinp", dinp, shape, ("dout",))
    arrays.done()
    cdef int t = team(4.0 * rows * Vp, rows)
    for i in prange(rows, nogil=True, num_threads=t, schedule="static"):
        softmax_backward_row(dy + i * Vp, y + i * Vp, dx + i * Vp, V, Vp)
    return dinp


def crossentropy_forward(logits, targets, *, vocab_size=None, losses=None, lse=None):
    """losses = lse - logits[target],  lse = log sum exp of the first vocab_size logits

    logits: float32 (..., Vp). targets: int32 (...), in 0..V-1, or -1: not counted, loss 0.
    losses, lse: float32 (...), overwritten, in nats. Returns losses, lse. Backward needs logits, targets and lse.
    Raises ValueError for a wrong shape, dtype, order or overlap, and for a target or vocab_size out of range.
    Split over rows. Source: llm.c train_gpt2.c crossentropy_forward, from logits instead of probabilities.
    """
    cdef Operands arrays = Operands("crossentropy_forward")
    cdef tuple shape = arrays.shape("logits", logits), row_shape = shape[:-1]
    cdef Py_ssize_t Vp = shape[-1], V = counted_columns(arrays, vocab_size, Vp), rows = product(row_shape), i
    losses, lse = given(losses, row_shape), given(lse, row_shape)
    cdef const float* x = arrays.inp("logits", logits, shape)
    cdef const int32_t* wanted = arrays.ints("targets", targets, row_shape, V, True)
    cdef float* loss = arrays.out("losses", losses, row_shape)
    cdef float* log_sum = arrays.out("lse", lse, row_shape)
    arrays.done()
    cdef int t = team(10.0 * rows * Vp, rows)
    for i in prange(rows, nogil=True, num_threads=t, schedule="static"):
        log_sum[i] = row_lse(x + i * Vp, V)
        loss[i] = log_sum[i] - x[i * Vp + wanted[i]] if wanted[i] >= 0 else 0.0
    return losses, lse


def crossentropy_backward(dlosses, logits, targets, lse, *, vocab_size=None, dlogits=None):
    """dlogits = (softmax(logits) - onehot(target)) dlosses; 0 for rows not counted and for padding columns

    dlosses, lse: float32 (...). logits: float32 (..., Vp). targets: int32 (...). lse from crossentropy_forward.
    dlogits: float32 (..., Vp), overwritten; it may be logits. Returns dlogits.
    Raises ValueError for a wrong shape, dtype, order or overlap, and for a target or vocab_size out of range.
    Split over rows. Source: llm.c train_gpt2.c crossentropy_softmax_backward.
    """
    cdef Operands arrays = Operands("crossentropy_backward")
    cdef tuple shape = arrays.shape("logits", logits), row_shape = shape[:-1]
    cdef Py_ssize_t Vp = shape[-1], V = counted_columns(arrays, vocab_size, Vp), rows = product(row_shape), i
    dlogits = given(dlogits, shape)
    cdef const float* dloss = arrays.inp("dlosses", dlosses, row_shape)
    cdef const float* x = arrays.inp("logits", logits, shape)
    cdef const int32_t* wanted = arrays.ints("targets", targets, row_shape, V, True)
    cdef const float* log_sum = arrays.inp("lse", lse, row_shape)
    cdef float* dx = arrays.out("dlogits", dlogits, shape, ("logits",))
    arrays.done()
    cdef int t = team(10.0 * rows * Vp, rows)
    for i in prange(rows, nogil=True, num_threads=t, schedule="static"):
        crossentropy_backward_row(x + i * Vp, dx + i * Vp, V, Vp, wanted[i], log_sum[i], dloss[i])
    return dlogits


def mean_loss(losses, targets, *, out=None):
    """out = sum of losses over the counted targets / their number; 0 where none is counted

    losses: float32 (...). targets: int32 (...); -1 is not counted. out: float32 (), overwritten, in nats.
    Returns out. The sum is kept in float64, in the order of memory, by one thread.
    Raises ValueError for a wrong shape, dtype, order or overlap.
    Source: the mean of llm.c train_gpt2.c gpt2_forward, over counted positions.
    """
    cdef Operands arrays = Operands("mean_loss")
    cdef tuple shape = arrays.shape("losses", losses, 0)
    out = given(out, ())
    cdef const float* loss = arrays.inp("losses", losses, shape)
    cdef const int32_t* wanted = arrays.ints("targets", targets, shape, 2147483647, True)
    cdef float* mean = arrays.out("out", out, ())
    arrays.done()
    cdef Py_ssize_t i, n = product(shape), counted = 0
    cdef double total = 0.0
    for i in range(n):
        if wanted[i] >= 0:
            total += loss[i]
            counted += 1
    mean[0] = <float> (total / counted) if counted else 0.0
    return out
