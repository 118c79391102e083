# Layer normalisation over the channels of each row; layernorm.cu computes.


def layernorm_forward(inp, weight, bias, *, eps=1e-5, residual=None, residual_out=None, out=None, mean=None,
                      rstd=None):
    """out = (x - mean) rstd weight + bias,  x = inp (+ residual),  mean = E[x],  rstd = 1 / sqrt(E[(x - mean)^2] + eps)

    inp: float32 or bfloat16 (..., C), and all others in its type but mean and rstd: float32 (...). weight, bias: (C).
    eps: added to the variance. residual: (..., C) or None. out: (..., C); out, mean and rstd are overwritten. With
    residual, x itself is written to residual_out (..., C), which may be inp or residual. Returns out, mean, rstd, and
    residual_out where there is a residual. Backward needs x, weight, mean, rstd.
    Raises ValueError for a wrong shape, dtype or overlap, and for residual_out without residual.
    A warp for each row, which stays in its registers. Source: arXiv 1607.06450; llm.c llmc/layernorm.cuh.
    """
    cdef Operands arrays = Operands("layernorm_forward")
    cdef tuple shape = arrays.shape("inp", inp), row_shape = shape[:-1]
    cdef size_t C = shape[-1], rows = product(row_shape)
    cdef float epsilon = eps
    if residual is None and residual_out is not None:
        raise arrays.error("residual_out is an output of residual only")
    out, mean, rstd = arrays.given(out, shape), arrays.given32(mean, row_shape), arrays.given32(rstd, row_shape)
    cdef const void* x = arrays.inp("inp", inp, shape)
    cdef const void* w = arrays.inp("weight", weight, (C,))
    cdef const void* b = arrays.inp("bias", bias, (C,))
    cdef const void* r = NULL
    cdef void* r_out = NULL
    if residual is not None:
        residual_out = arrays.given(residual_out, shape)
        r = arrays.inp("residual", residual, shape)
        r_out = arrays.out("residual_out", residual_out, shape, ("inp", "residual"))
    cdef void* y = arrays.out("out", out, shape)
    cdef float* m = arrays.out32("mean", mean, row_shape)
    cdef float* s = arrays.out32("rstd", rstd, row_shape)
    arrays.done()
    kernels.layernorm_forward(arrays.dtype(), x, r, w, b, r_out, y, m, s, rows, C, epsilon)
    return (out, mean, rstd) if residual is None else (out, mean, rstd, residual_out)


def layernorm_backward(dout, inp, weight, mean, rstd, *, dresidual=None, dinp=None, dweight=None, dbias=None,
                       accumulate=False):
    """dinp = rstd (d - E[d] - n E[d n]) + dresidual,  dweight (+)= sum of dout n,  dbias (+)= sum of dout
    with n = (inp - mean) rstd, d = dout weight, E over the channels of a row, sums over the rows

    dout, inp: float32 or bfloat16 (..., C). weight: (C). mean, rstd: float32 (...) from layernorm_forward.
    dresidual: (..., C), the gradient that reaches inp past the normalisation, or None.
    dinp: (..., C), overwritten; it may be dout or dresidual. dweight, dbias: (C), overwritten, or added to with
    accumulate=True. Returns dinp, dweight, dbias. Raises ValueError for a wrong shape, dtype or overlap.
    Split over up to 1024 chunks of rows, whose sums are float32 and added in a fixed order.
    Source: llm.c llmc/layernorm.cuh.
    """
    cdef Operands arrays = Operands("layernorm_backward")
    cdef tuple shape = arrays.shape("inp", inp), row_shape = shape[:-1]
    cdef size_t C = shape[-1], rows = product(row_shape)
    cdef bint add = accumulate
    dinp = arrays.given(dinp, shape)
    dweight, dbias = arrays.given_gradient(dweight, (C,), add), arrays.given_gradient(dbias, (C,), add)
    cdef const void* dy = arrays.inp("dout", dout, shape)
    cdef const void* x = arrays.inp("inp", inp, shape)
    cdef const void* w = arrays.inp("weight", weight, (C,))
    cdef const float* m = arrays.inp32("mean", mean, row_shape)
    cdef const float* s = arrays.inp32("rstd", rstd, row_shape)
    cdef const void* r = arrays.inp("dresidual", dresidual, shape) if dresidual is not None else NULL
    cdef void* dx = arrays.out("dinp", dinp, shape, ("dout", "dresidual"))
    cdef void* dw = arrays.out("dweight", dweight, (C,))
    cdef void* db = arrays.out("dbias", dbias, (C,))
    arrays.done()
    kernels.layernorm_backward(arrays.dtype(), dy, x, w, m, s, r, dx, dw, db, rows, C, add)
    return dinp, dweight, dbias
