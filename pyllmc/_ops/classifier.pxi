# LM head, softmax and cross-entropy in one op, in chunks of rows: (B, T, Vp) never exists.

cdef enum:
    LOGITS = 13000000       # floats of logits at once (50 MiB): 256 rows of GPT-2's vocabulary


cdef inline Py_ssize_t chunk_rows(Py_ssize_t rows, Py_ssize_t V) noexcept:
    """Rows of a chunk: fixed by the shapes, never by the machine, because dweight is summed chunk by chunk."""
    return smaller(rows, larger(16, LOGITS // V // 16 * 16))


cdef int chunk_logits(const float* inp, const float* weight, float* logits, Py_ssize_t rows, Py_ssize_t V,
                      Py_ssize_t C) except -1:
    """logits (rows, V) = inp weight^T."""
    cdef Product p = new_product(rows, V, C)
    p.a, p.lda = inp, C
    p.b, p.ldb = weight, C
    p.c = p.out = logits
    return gemm(&p)


cdef void loss_row(float* logits, Py_ssize_t V, int32_t target, float* loss, float scale,
                   bint backward) noexcept nogil:
    """One row's loss; with `backward` its logits become their gradient."""
    cdef float lse
    if target >= 0:
        lse = row_lse(logits, V)
        loss[0] = lse - logits[target]
    else:
        lse = 0.0
        loss[0] = 0.0
    if backward:
        crossentropy_backward_row(logits, logits, V, V, target, lse, scale)


cdef int chunk_losses(float* logits, Py_ssize_t rows, Py_ssize_t V, const int32_t* targets, float* losses,
                      float scale, bint backward) except -1:
    cdef Py_ssize_t i
    cdef int t = team(10.0 * rows * V, rows)
    for i in prange(rows, nogil=True, num_threads=t, schedule="static"):
        loss_row(logits + i * V, V, targets[i], losses + i, scale, backward)
    return 0


def classifier_forward(inp, weight, targets, *, vocab_size=None, losses=None):
    """losses = crossentropy(inp weight^T, targets) over the first vocab_size rows of weight

    inp: float32 (..., C). weight: float32 (Vp, C), without bias. targets: int32 (...), in 0..V-1 or -1 (not counted).
    losses: float32 (...), overwritten, in nats; 0 where not counted. Returns losses.
    Raises ValueError for a wrong shape, dtype, order or overlap, and for a target or vocab_size out of range.
    Split as matmul_forward, then over rows. Source: llm.c train_gpt2.c gpt2_forward, last three calls.
    """
    cdef Operands arrays = Operands("classifier_forward")
    cdef tuple shape = arrays.shape("inp", inp), row_shape = shape[:-1]
    cdef tuple weight_shape = arrays.shape("weight", weight, 2, 2)
    cdef Py_ssize_t C = shape[-1], rows = product(row_shape), first = 0, count
    cdef Py_ssize_t V = counted_columns(arrays, vocab_size, weight_shape[0])
    losses = given(losses, row_shape)
    cdef const float* x = arrays.inp("inp", inp, shape)
    cdef const float* w = arrays.inp("weight", weight, (weight_shape[0], C))
    cdef const int32_t* wanted = arrays.ints("targets", targets, row_shape, V, True)
    cdef float* loss = arrays.out("losses", losses, row_shape)
    arrays.done()
    cdef Scratch scratch = Scratch(chunk_rows(rows, V) * V)
    cdef float* logits = scratch.floats()
    while first < rows:
        count = smaller(chunk_rows(rows, V), rows - first)
        chunk_logits(x + first * C, w, logits, count, V, C)
        chunk_losses(logits, count, V, wanted + first, loss + first, 0.0, False)
        first += count
    return losses


def classifier_forward_backward(inp, weight, targets, *, vocab_size=None, loss_scale=1.0, losses=None, dinp=None,
                                dweight=None, accumulate=False):
    """losses as classifier_forward;  dlogits = (softmax - onehot) loss_scale / counted,
    dinp = dlogits weight,  dweight (+)= dlogits^T inp

    inp: float32 (..., C). weight: float32 (Vp, C). targets: int32 (...), in 0..V-1 or -1 (not counted).
    losses: float32 (...), overwritten, in nats, not scaled. The gradients are those of loss_scale * mean_loss.
    dinp: float32 (..., C), overwritten; it may be inp. dweight: float32 (Vp, C), overwritten (rows from vocab_size on
    become 0), or added to with accumulate=True. Returns losses, dinp, dweight.
    Raises ValueError for a wrong shape, dtype, order or overlap, and for a target or vocab_size out of range.
    Rows are worked on in chunks of at most 50 MiB of logits. Split as matmul_forward and matmul_backward.
    Source: llm.c fused_classifier.cuh and the matmuls around it.
    """
    cdef Operands arrays = Operands("classifier_forward_backward")
    cdef tuple shape = arrays.shape("inp", inp), row_shape = shape[:-1]
    cdef tuple weight_shape = arrays.shape("weight", weight, 2, 2)
    cdef Py_ssize_t C = shape[-1], Vp = weight_shape[0], rows = product(row_shape), first = 0, count, i, counted = 0
    cdef Py_ssize_t V = counted_columns(arrays, vocab_size, Vp)
    cdef float scale = 0.0
    cdef bint add = accumulate
    losses, dinp, dweight = given(losses, row_shape), given(dinp, shape), given_gradient(dweight, (Vp, C), add)
    cdef const float* x = arrays.inp("inp", inp, shape)
    cdef const float* w = arrays.inp("weight", weight, (Vp, C))
    cdef const int32_t* wanted = arrays.ints("targets", targets, row_shape, V, True)
    cdef float* loss = arrays.out("losses", losses, row_shape)
    cdef float* dx = arrays.out("dinp", dinp, shape, ("inp",))
    cdef float* dw = arrays.out("dweight", dweight, (Vp, C))
    arrays.done()
    for i in range(rows):
        counted += wanted[i] >= 0
    if counted:
        scale = <double> loss_scale / counted
    cdef Scratch scratch = Scratch(chunk_rows(rows, V) * V)
    cdef float* logits = scratch.floats()
    while first < rows:
        count = smaller(chunk_rows(rows, V), rows - first)
        chunk_logits(x + first * C, w, logits, count, V, C)
        chunk_losses(logits, count, V, wanted + first, loss + first, scale, True)
        matmul_dweight(logits, x + first * C, dw, NULL, count, V, C, add or first > 0)
        matmul_dinp(logits, w, dx + first * C, count, V, C, NULL)      # last: dinp may lie where inp does
        first += count
    if not add:
        memset(dw + V * C, 0, (Vp - V) * C * sizeof(float))
    return losses, dinp, dweight
