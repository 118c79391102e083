# Causal multi-head attention; attention.cu chooses the kernels.


def attention_forward(qkv, num_heads, *, out=None, lse=None):
    """out = softmax(mask(q k^T / sqrt(HS))) v per head,  lse = log sum exp of the masked, scaled scores

    qkv: float32 or bfloat16 (B, T, 3C), each row [q | k | v], each of the three NH heads of HS channels side by side.
    num_heads: NH; C must be a multiple of it. The mask is causal: position t sees 0..t.
    out: (B, T, C) in qkv's type; lse: float32 (B, NH, T), both overwritten. Returns out, lse.
    Backward needs qkv, out and lse. Raises ValueError for a wrong shape, dtype or overlap, and for channels that the
    heads do not divide.
    A block for each 128 queries of a head; bfloat16 heads of a multiple of 8 channels up to 128 go to the tensor cores,
    which sum in float32 and take the probabilities in bfloat16.
    Source: Dao (2023), arXiv 2307.08691; the result is that of llm.c train_gpt2.c attention_forward.
    """
    cdef Operands arrays = Operands("attention_forward")
    cdef tuple shape = arrays.shape("qkv", qkv, 3, 3)
    cdef Py_ssize_t B = shape[0], T = shape[1], C = shape[2] // 3, NH
    if shape[2] % 3 or not 1 <= num_heads <= C or C % num_heads:
        raise arrays.error(f"qkv must have 3 * num_heads * HS channels, got {shape[2]} with num_heads {num_heads}")
    NH = num_heads
    out, lse = arrays.given(out, (B, T, C)), arrays.given32(lse, (B, NH, T))
    cdef const void* x = arrays.inp("qkv", qkv, shape)
    cdef void* y = arrays.out("out", out, (B, T, C))
    cdef float* logs = arrays.out32("lse", lse, (B, NH, T))
    arrays.done()
    kernels.attention_forward(arrays.dtype(), x, y, logs, B, T, NH, C // NH)
    return out, lse


def attention_backward(dout, qkv, out, lse, *, dqkv=None):
    """dv = p^T dout,  ds = p (dout v^T - rowsum(dout out)) / sqrt(HS),  dq = ds k,  dk = ds^T q,  p = e^(s - lse)

    dout, out: float32 or bfloat16 (B, T, C). qkv: (B, T, 3C). lse: float32 (B, NH, T), which gives the number of heads.
    dqkv: (B, T, 3C) in qkv's type, overwritten. Returns dqkv.
    Raises ValueError for a wrong shape, dtype or overlap.
    A block for each 128 keys of a head; dq is summed over them in a fixed order, in 4 B T C bytes of scratch.
    Source: Dao (2023), arXiv 2307.08691; the result is that of llm.c train_gpt2.c attention_backward.
    """
    cdef Operands arrays = Operands("attention_backward")
    cdef tuple shape = arrays.shape("qkv", qkv, 3, 3), lse_shape = arrays.shape("lse", lse, 3, 3)
    cdef Py_ssize_t B = shape[0], T = shape[1], C = shape[2] // 3, NH = lse_shape[1]
    if shape[2] % 3 or C % NH:
        raise arrays.error(f"qkv must have 3 * NH * HS channels, got {shape[2]} with NH = {NH} from lse")
    dqkv = arrays.given(dqkv, shape)
    cdef const void* dy = arrays.inp("dout", dout, (B, T, C))
    cdef const void* x = arrays.inp("qkv", qkv, shape)
    cdef const void* y = arrays.inp("out", out, (B, T, C))
    cdef const float* logs = arrays.inp32("lse", lse, (B, NH, T))
    cdef void* dx = arrays.out("dqkv", dqkv, shape)
    arrays.done()
    kernels.attention_backward(arrays.dtype(), dy, x, y, logs, dx, B, T, NH, C // NH)
    return dqkv


def attention_decode(qkv, key_cache, value_cache, position, *, out=None):
    """out = softmax(mask(q k^T / sqrt(HS))) v over the cached keys and values of positions 0 .. position + n - 1

    qkv: float32 or bfloat16 (B, n, 3C), the n new positions position .. position + n - 1 in attention_forward's layout.
    key_cache, value_cache: (B, NH, maxT, HS): the new keys and values are written into them first.
    out: (B, n, C), overwritten. Returns out. There is no backward pass.
    Raises ValueError for a wrong shape, dtype or overlap, and for positions beyond maxT.
    Up to 4 new positions a block for each query of each head and 128 keys; more as attention_forward.
    Source: attention_forward.
    """
    cdef Operands arrays = Operands("attention_decode")
    cdef tuple shape = arrays.shape("qkv", qkv, 3, 3), cache = arrays.shape("key_cache", key_cache, 4, 4)
    cdef Py_ssize_t B = shape[0], n = shape[1], NH = cache[1], HS = cache[3], C = NH * HS
    if shape[2] != 3 * C or B != <Py_ssize_t> cache[0]:
        raise arrays.error(f"qkv must have shape ({cache[0]}, n, {3 * C}) for caches of shape {cache}, got {shape}")
    if not 0 <= position <= cache[2] - n:
        raise arrays.error(f"{n} positions from {position} on do not fit the caches' {cache[2]}")
    out = arrays.given(out, (B, n, C))
    cdef const void* x = arrays.inp("qkv", qkv, shape)
    cdef void* keys = arrays.out("key_cache", key_cache, cache)
    cdef void* values = arrays.out("value_cache", value_cache, cache)
    cdef void* y = arrays.out("out", out, (B, n, C))
    arrays.done()
    kernels.attention_decode(arrays.dtype(), x, keys, values, y, B, n, position, cache[2], NH, HS)
    return out
