# GELU in its tanh form, as GPT-2 has it; gelu.cu computes.


def gelu_forward(inp, *, out=None):
    """out = inp/2 (1 + tanh(sqrt(2/pi) (inp + 0.044715 inp^3)))

    inp: float32 or bfloat16, any shape. out: the same shape and type, overwritten. Returns out.
    Backward needs inp. Raises ValueError for a wrong shape, dtype or overlap.
    16 bytes to a thread. Within 1e-6 + 1e-5 |out| of the exact value before it is rounded to the type.
    Source: Hendrycks & Gimpel (2016), arXiv 1606.08415, eq. 4; llm.c llmc/gelu.cuh.
    """
    cdef Operands arrays = Operands("gelu_forward")
    cdef tuple shape = arrays.shape("inp", inp, 0)
    out = arrays.given(out, shape)
    cdef const void* x = arrays.inp("inp", inp, shape)
    cdef void* y = arrays.out("out", out, shape)
    arrays.done()
    kernels.gelu_forward(arrays.dtype(), x, y, product(shape))
    return out


def gelu_backward(dout, inp, *, dinp=None):
    """dinp = dout * gelu'(inp), gelu'(x) = s + x s (1 - s) 2u', s = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)

    dout, inp: float32 or bfloat16, one shape. dinp: the same shape and type, overwritten; it may be dout. Returns dinp.
    Raises ValueError for a wrong shape, dtype or overlap. Split as gelu_forward.
    Source: the derivative of gelu_forward; llm.c llmc/gelu.cuh.
    """
    cdef Operands arrays = Operands("gelu_backward")
    cdef tuple shape = arrays.shape("inp", inp, 0)
    dinp = arrays.given(dinp, shape)
    cdef const void* dy = arrays.inp("dout", dout, shape)
    cdef const void* x = arrays.inp("inp", inp, shape)
    cdef void* dx = arrays.out("dinp", dinp, shape, ("dout",))
    arrays.done()
    kernels.gelu_backward(arrays.dtype(), dy, x, dx, product(shape))
    return dinp
