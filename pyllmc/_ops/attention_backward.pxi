# The backward pass of attention, per head and pair of blocks of BQ queries and BQ keys:
#     S = Q K^T, P = e^(S / sqrt(HS) - lse)       recomputed; nothing of size T x T was saved
#     dP = dO V^T, dS = P (dP - D) / sqrt(HS)     D = rowsum(dO O)
#     dV += P^T dO, dK += dS^T Q, dQ += dS K
# Queries run down and keys across, so that P and dS are "by k" for dV and dK as they are; dS is transposed for dQ.


cdef struct BackwardHead:
    # one head's operands, packed (a_*: panels of MR rows; b_*: of NR rows, or of NR columns), and its sums
    float* a_q
    float* a_dout
    float* b_k
    float* b_v
    float* q
    float* k
    float* dout
    float* dq           # (Tp, HSp)
    float* dk
    float* dv
    float* dots         # D (T)
    float* p            # (BQ, BQ) tiles: P, dP then dS, dS^T
    float* ds
    float* ds_t


cdef inline Py_ssize_t backward_scratch(Py_ssize_t Tp, Py_ssize_t HSp) noexcept nogil:
    return 10 * Tp * HSp + Tp + 3 * BQ * BQ


cdef BackwardHead carve(float* scratch, Py_ssize_t Tp, Py_ssize_t HSp) noexcept nogil:
    cdef BackwardHead w
    cdef Py_ssize_t size = Tp * HSp
    w.a_q, w.a_dout, w.b_k, w.b_v = scratch, scratch + size, scratch + 2 * size, scratch + 3 * size
    w.q, w.k, w.dout = scratch + 4 * size, scratch + 5 * size, scratch + 6 * size
    w.dq, w.dk, w.dv = scratch + 7 * size, scratch + 8 * size, scratch + 9 * size
    w.dots = scratch + 10 * size
    w.p = w.dots + Tp
    w.ds = w.p + BQ * BQ
    w.ds_t = w.ds + BQ * BQ
    return w


cdef void score_gradients(const BackwardHead* w, const float* lse, Py_ssize_t q0, Py_ssize_t nq, Py_ssize_t k0,
                          Py_ssize_t nk, float scale) noexcept nogil:
    """S and dP in the tiles become P and dS; keys after a query get 0."""
    cdef Py_ssize_t i, j, visible
    cdef vfloat p, ds, factor = vset1(scale), bias, dot, zero = vset1(0.0)
    for i in range(nq):
        bias = vset1(-lse[q0 + i])
        dot = vset1(w.dots[q0 + i])
        visible = q0 + i - k0 + 1
        j = 0
        while j < nk:
            if j < visible:
                p = vexp(vfma(factor, vload(w.p + i * BQ + j), bias))
                ds = vmul(vmul(p, vsub(vload(w.ds + i * BQ + j), dot)), factor)
                if j + W > visible:
                    p = vkeep_n(p, visible - j)
                    ds = vkeep_n(ds, visible - j)
            else:
                p = zero
                ds = zero
            vstore(w.p + i * BQ + j, p)
            vstore(w.ds + i * BQ + j, ds)
            j += W
    i = 0
    while i < nq:
        j = 0
        while j < nk:
            vtranspose(w.ds + i * BQ + j, BQ, w.ds_t + j * BQ + i, BQ)
            j += W
        i += W


cdef void backward_blocks(const BackwardHead* w, const float* lse, Py_ssize_t T, Py_ssize_t HS, Py_ssize_t HSp,
                          float scale, Py_ssize_t q0, Py_ssize_t k0) noexcept nogil:
    """What queries q0.. and keys k0.. give to dQ, dK and dV."""
    cdef Py_ssize_t nq = smaller(BQ, T - q0), nk = smaller(BQ, T - k0), i = 0, j, skip, depth
    while i < nq:
        j = 0
        while j < nk and k0 + j <= q0 + i + MR - 1:
            tile_product(HS, w.a_q + (q0 + i) * HS, MR, w.b_k + (k0 + j) * HS, NR, w.p + i * BQ + j, BQ, False)
            tile_product(HS, w.a_dout + (q0 + i) * HS, MR, w.b_v + (k0 + j) * HS, NR, w.ds + i * BQ + j, BQ, False)
            j += NR
        i += MR
    score_gradients(w, lse, q0, nq, k0, nk, scale)
    i = 0
    while i < nk:
        skip = larger(0, k0 + i - q0)       # queries before the panel's first key
        if skip < nq:
            j = 0
            while j < HSp:
                tile_product(nq - skip, w.p + skip * BQ + i, BQ, w.dout + j * T + (q0 + skip) * NR, NR,
                             w.dv + (k0 + i) * HSp + j, HSp, True)
                tile_product(nq - skip, w.ds + skip * BQ + i, BQ, w.q + j * T + (q0 + skip) * NR, NR,
                             w.dk + (k0 + i) * HSp + j, HSp, True)
                j += NR
        i += MR
    i = 0
    while i < nq:
        depth = smaller(nk, q0 + i + MR - k0)
        j = 0
        while j < HSp:
            tile_product(depth, w.ds_t + i, BQ, w.k + j * T + k0 * NR, NR, w.dq + (q0 + i) * HSp + j, HSp, True)
            j += NR
        i += MR


cdef void backward_head(const float* qkv, const float* out, const float* dout, const float* lse, float* dqkv,
                        Py_ssize_t head, Py_ssize_t T, Py_ssize_t NH, Py_ssize_t HS, float scale,
                        float* scratch) noexcept nogil:
    cdef Py_ssize_t C = NH * HS, HSp = round_up(HS, NR), Tp = round_up(T, BQ), b = head // NH, n = head % NH
    cdef Py_ssize_t i, j, q0, k0, m
    cdef BackwardHead w = carve(scratch, Tp, HSp)
    cdef vfloat x
    qkv += b * T * 3 * C + n * HS
    dqkv += b * T * 3 * C + n * HS
    out += b * T * C + n * HS
    dout += b * T * C + n * HS
    lse += head * T
    pack_rows(qkv, 3 * C, T, HS, MR, w.a_q)
    pack_rows(dout, C, T, HS, MR, w.a_dout)
    pack_rows(qkv + C, 3 * C, T, HS, NR, w.b_k)
    pack_rows(qkv + 2 * C, 3 * C, T, HS, NR, w.b_v)
    pack_columns(qkv, 3 * C, T, HS, w.q)
    pack_columns(qkv + C, 3 * C, T, HS, w.k)
    pack_columns(dout, C, T, HS, w.dout)
    memset(w.dq, 0, 3 * Tp * HSp * sizeof(float))       # dq, dk and dv lie side by side
    for i in range(T):
        x = vset1(0.0)
        j = 0
        while j < HS:
            m = smaller(W, HS - j)
            x = vfma(load_some(dout + i * C + j, m), load_some(out + i * C + j, m), x)
            j += W
        w.dots[i] = vreduce_add(x)
    k0 = 0
    while k0 < T:
        q0 = k0
        while q0 < T:
            backward_blocks(&w, lse, T, HS, HSp, scale, q0, k0)
            q0 += BQ
        k0 += BQ
    for i in range(T):
        memcpy(dqkv + i * 3 * C, w.dq + i * HSp, HS * sizeof(float))
        memcpy(dqkv + i * 3 * C + C, w.dk + i * HSp, HS * sizeof(float))
        memcpy(dqkv + i * 3 * C + 2 * C, w.dv + i * HSp, HS * sizeof(float))


def attention_backward(dout, qkv, out, lse, *, dqkv=None):
    """dv = p^T dout,  ds = p (dout v^T - rowsum(dout out)) / sqrt(HS),  dq = ds k,  dk = ds^T q,  p = e^(s - lse)

    dout, out: float32 (B, T, C). qkv: float32 (B, T, 3C). lse: float32 (B, NH, T), which gives the number of heads.
    dqkv: float32 (B, T, 3C), overwritten. Returns dqkv.
    Raises ValueError for a wrong shape, dtype, order or overlap.
    Split over heads; each keeps O(T) floats of its own.
    Source: Dao et al. (2022), arXiv 2205.14135, algorithm 4; the result is that of llm.c attention_backward.
    """
    cdef Operands arrays = Operands("attention_backward")
    cdef tuple shape = arrays.shape("qkv", qkv, 3, 3), lse_shape = arrays.shape("lse", lse, 3, 3)
    cdef Py_ssize_t B = shape[0], T = shape[1], C = shape[2] // 3, NH = lse_shape[1]
    if shape[2] % 3 or C % NH:
        raise arrays.error(f"qkv must have 3 * NH * HS channels, got {shape[2]} with NH = {NH} from lse")
    dqkv = given(dqkv, shape)
    cdef const float* dy = arrays.inp("dout", dout, (B, T, C))
    cdef const float* x = arrays.inp("qkv", qkv, shape)
    cdef const float* y = arrays.inp("out", out, (B, T, C))
    cdef const float* logs = arrays.inp("lse", lse, (B, NH, T))
    cdef float* dx = arrays.out("dqkv", dqkv, shape)
    arrays.done()
    cdef Heads h = new_heads(B, T, T, NH, C // NH)
    cdef Py_ssize_t size = backward_scratch(round_up(T, BQ), h.HSp), head
    cdef int t = team(<double> B * T * T * C, B * NH)
    cdef Scratch scratch = Scratch(t * size)
    cdef float* work = scratch.floats()
    for head in prange(B * NH, nogil=True, num_threads=t, schedule="dynamic"):
        backward_head(x, y, dy, logs, dx, head, T, NH, h.HS, h.scale, work + threadid() * size)
    return dqkv
