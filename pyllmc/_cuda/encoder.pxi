# Token and position embedding: the first thing a step does, and, backward, the last. encoder.cu computes.


def encoder_forward(tokens, wte, wpe, *, out=None):
    """out[b, t] = wte[tokens[b, t]] + wpe[t]

    tokens: int32 (B, T), each in 0..V-1. wte: float32 or bfloat16 (V, C). wpe: (maxT, C), T <= maxT.
    out: (B, T, C), overwritten. Returns out. Backward needs tokens.
    Raises ValueError for a wrong shape, dtype or overlap, for T > maxT and for a token outside the table; where
    the tokens did not come from from_host, such a token's row becomes NaN instead.
    16 bytes to a thread. Source: llm.c llmc/encoder.cuh.
    """
    cdef Operands arrays = Operands("encoder_forward")
    cdef tuple token_shape = arrays.shape("tokens", tokens, 2, 2)
    cdef tuple wte_shape = arrays.shape("wte", wte, 2, 2), wpe_shape = arrays.shape("wpe", wpe, 2, 2)
    if token_shape[1] > wpe_shape[0]:
        raise arrays.error(f"tokens has {token_shape[1]} positions, but wpe only {wpe_shape[0]}")
    cdef tuple shape = token_shape + (wte_shape[1],)
    out = arrays.given(out, shape)
    cdef const int32_t* ids = arrays.ints("tokens", tokens, token_shape, wte_shape[0])
    cdef const void* table = arrays.inp("wte", wte, wte_shape)
    cdef const void* positions = arrays.inp("wpe", wpe, (wpe_shape[0], wte_shape[1]))
    cdef void* y = arrays.out("out", out, shape)
    arrays.done()
    kernels.encoder_forward(arrays.dtype(), ids, table, positions, y, token_shape[0], token_shape[1], wte_shape[1],
                            wte_shape[0])
    return out


def encoder_backward(dout, tokens, wte, wpe, *, dwte=None, dwpe=None, accumulate=False, tied=False):
    """dwte[v] (+)= sum of dout[b, t] where tokens[b, t] = v,  dwpe[t] (+)= sum over b of dout[b, t]

    dout: float32 or bfloat16 (B, T, C). tokens: int32 (B, T). wte (V, C), wpe (maxT, C): only their shapes are read.
    dwte (V, C), dwpe (maxT, C): overwritten (rows that do not occur become 0), or added to with accumulate=True.
    tied=True: dwte already holds the gradient of the tied LM head and is always added to.
    Returns dwte, dwpe. Raises ValueError for a wrong shape, dtype or overlap, for T > maxT, for a token outside
    the table, and for tied without dwte. The rows are sorted by token on the GPU; those of a token are added up in the
    order of the batch, in float32, in pieces of 32 sorted rows. Source: llm.c llmc/encoder.cuh, where the host sorts.
    """
    cdef Operands arrays = Operands("encoder_backward")
    cdef tuple token_shape = arrays.shape("tokens", tokens, 2, 2)
    cdef tuple wte_shape = arrays.shape("wte", wte, 2, 2), wpe_shape = arrays.shape("wpe", wpe, 2, 2)
    cdef bint add = accumulate, add_wte = accumulate or tied
    if token_shape[1] > wpe_shape[0]:
        raise arrays.error(f"tokens has {token_shape[1]} positions, but wpe only {wpe_shape[0]}")
    if tied and dwte is None:
        raise arrays.error("tied=True adds to dwte, so dwte must be given")
    if wpe_shape[1] != wte_shape[1]:
        raise arrays.error(f"wpe must have shape ({wpe_shape[0]}, {wte_shape[1]}), got {wpe_shape}")
    dwte, dwpe = arrays.given_gradient(dwte, wte_shape, add), arrays.given_gradient(dwpe, wpe_shape, add)
    cdef const void* dy = arrays.inp("dout", dout, token_shape + (wte_shape[1],))
    cdef const int32_t* ids = arrays.ints("tokens", tokens, token_shape, wte_shape[0])
    cdef void* token = arrays.out("dwte", dwte, wte_shape)
    cdef void* position = arrays.out("dwpe", dwpe, wpe_shape)
    arrays.done()
    if product(token_shape) > 2147483647:
        raise arrays.error(f"at most 2147483647 tokens at once, got {product(token_shape)}")
    kernels.encoder_backward(arrays.dtype(), dy, ids, token, position, token_shape[0], token_shape[1], wte_shape[1],
                             wte_shape[0], wpe_shape[0], add_wte, add)
    return dwte, dwpe
