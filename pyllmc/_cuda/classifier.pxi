# LM head, softmax and cross-entropy in one op, in chunks of rows; classifier.cu computes.


def classifier_forward(inp, weight, targets, *, vocab_size=None, losses=None):
    """losses = crossentropy(inp weight^T, targets) over the first vocab_size rows of weight

    inp: float32 or bfloat16 (..., C), and weight in its type: (Vp, C), without bias. targets: int32 (...), in 0..V-1 or
    -1 (not counted). losses: float32 (...), overwritten, in nats; 0 where not counted. Returns losses.
    Raises ValueError for a wrong shape, dtype or overlap, and for a target or vocab_size out of range; OSError without
    cuBLASLt. A block for each row of logits, which are in the type of inp. Source: llm.c llmc/fused_classifier.cuh.
    """
    cdef Operands arrays = Operands("classifier_forward")
    cdef tuple shape = arrays.shape("inp", inp), row_shape = shape[:-1]
    cdef tuple weight_shape = arrays.shape("weight", weight, 2, 2)
    cdef size_t C = shape[-1], Vp = weight_shape[0], rows = product(row_shape)
    cdef size_t V = counted_columns(arrays, vocab_size, Vp)
    losses = arrays.given32(losses, row_shape)
    cdef const void* x = arrays.inp("inp", inp, shape)
    cdef const void* w = arrays.inp("weight", weight, (weight_shape[0], shape[-1]))
    cdef const int32_t* wanted = arrays.ints("targets", targets, row_shape, V, True)
    cdef float* loss = arrays.out32("losses", losses, row_shape)
    arrays.done()
    need_products()
    kernels.classifier_forward(arrays.dtype(), x, w, wanted, loss, rows, C, V, Vp)
    return losses


def classifier_forward_backward(inp, weight, targets, *, vocab_size=None, loss_scale=1.0, losses=None, dinp=None,
                                dweight=None, accumulate=False):
    """losses as classifier_forward;  dlogits = (softmax - onehot) loss_scale / counted,
    dinp = dlogits weight,  dweight (+)= dlogits^T inp

    inp: float32 or bfloat16 (..., C), and all others in its type but losses. weight: (Vp, C). targets: int32 (...), in
    0..V-1 or -1 (not counted). losses: float32 (...), overwritten, in nats, not scaled. The gradients are those of
    loss_scale * mean_loss. dinp: (..., C), overwritten; it may be inp. dweight: (Vp, C), overwritten (rows from
    vocab_size on become 0), or added to with accumulate=True. Returns losses, dinp, dweight.
    Raises ValueError for a wrong shape, dtype or overlap, and for a target or vocab_size out of range; OSError without
    cuBLASLt.
    Rows are worked on in chunks, product_options(logits_bytes=...) of logits at once; over several chunks dweight is
    summed in float32 and rounded once. Source: llm.c llmc/fused_classifier.cuh and the products around it.
    """
    cdef Operands arrays = Operands("classifier_forward_backward")
    cdef tuple shape = arrays.shape("inp", inp), row_shape = shape[:-1]
    cdef tuple weight_shape = arrays.shape("weight", weight, 2, 2)
    cdef size_t C = shape[-1], Vp = weight_shape[0], rows = product(row_shape)
    cdef size_t V = counted_columns(arrays, vocab_size, Vp)
    cdef float scale = loss_scale
    cdef bint add = accumulate
    losses, dinp = arrays.given32(losses, row_shape), arrays.given(dinp, shape)
    dweight = arrays.given_gradient(dweight, (weight_shape[0], shape[-1]), add)
    cdef const void* x = arrays.inp("inp", inp, shape)
    cdef const void* w = arrays.inp("weight", weight, (weight_shape[0], shape[-1]))
    cdef const int32_t* wanted = arrays.ints("targets", targets, row_shape, V, True)
    cdef float* loss = arrays.out32("losses", losses, row_shape)
    cdef void* dx = arrays.out("dinp", dinp, shape, ("inp",))
    cdef void* dw = arrays.out("dweight", dweight, (weight_shape[0], shape[-1]))
    arrays.done()
    need_products()
    kernels.classifier_forward_backward(arrays.dtype(), x, w, wanted, scale, loss, dx, dw, rows, C, V, Vp, add)
    return losses, dinp, dweight
