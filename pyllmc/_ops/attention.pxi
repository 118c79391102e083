# Causal multi-head attention in tiles (Dao et al., 2022): no T x T matrix is ever in memory.
#
# Forward, for one head and a block of BQ queries, over blocks of BK keys:
#     S^T = K Q^T                     keys down, queries across: the lanes of a vector are queries, so the softmax
#     P^T = e^(S^T - m)               over keys needs no sum across lanes, and P^T is "by k" just as the register
#     O   = P V                       tile wants its left operand
# with the running maximum m and sum of online softmax. Its backward pass is in attention_backward.pxi.
# Tiles above the diagonal are skipped. Each thread packs the keys and values of the head that it works on, zero-padded
# to whole tiles.

cdef enum:
    BQ = 3 * NR             # queries in a block: a multiple of MR, NR and W
    BK = 96                 # keys in a block: a multiple of MR
    AHEAD = 256             # up to so many positions the next head is fetched while one is worked on: L2 holds both
    FEW_QUERIES = 4         # up to so many queries a head is limited by reading its cache once: no packing pays


cdef float LOWEST = -3.4e38     # what a maximum starts from: finite, so that no infinity is subtracted from another


cdef struct Heads:
    Py_ssize_t B
    Py_ssize_t NH
    Py_ssize_t HS
    Py_ssize_t HSp          # HS rounded up to whole tiles
    Py_ssize_t T            # queries per sequence
    Py_ssize_t S            # keys per sequence: query i sees the first S - T + i + 1 of them
    Py_ssize_t Sp           # S rounded up to whole tiles
    float scale             # 1 / sqrt(HS)
    const float* q          # head n of sequence b, row t: q[b * q_batch + n * HS + t * q_row]
    Py_ssize_t q_batch
    Py_ssize_t q_row
    const float* k          # k[b * kv_batch + n * kv_head + t * kv_row], and v likewise
    const float* v
    Py_ssize_t kv_batch
    Py_ssize_t kv_head
    Py_ssize_t kv_row
    float* out              # (B, T, C)
    float* lse              # (B, NH, T) or NULL


cdef Heads new_heads(Py_ssize_t B, Py_ssize_t T, Py_ssize_t S, Py_ssize_t NH, Py_ssize_t HS) noexcept:
    cdef Heads h
    memset(&h, 0, sizeof(Heads))
    h.B, h.T, h.S, h.NH, h.HS = B, T, S, NH, HS
    h.HSp = round_up(HS, NR)
    h.Sp = round_up(S, MR)
    vstore_n(&h.scale, vdiv(vset1(1.0), vsqrt(vset1(<float> HS))), 1)
    return h


cdef inline void pack_rows(const float* rows, Py_ssize_t ld, Py_ssize_t count, Py_ssize_t HS, Py_ssize_t width,
                           float* dst) noexcept nogil:
    """rows (count, HS) as panels of `width` rows, each by k: element (i, k) of a panel at k * width + i."""
    cdef Py_ssize_t i = 0
    while i < count:
        pack(rows + i * ld, ld, False, count - i, HS, width, dst + i * HS)
        i += width


cdef void pack_left(const float* rows, Py_ssize_t ld, Py_ssize_t count, Py_ssize_t HS, float* dst) noexcept nogil:
    pack_rows(rows, ld, count, HS, MR, dst)


cdef void pack_right(const float* rows, Py_ssize_t ld, Py_ssize_t count, Py_ssize_t HS, float* dst) noexcept nogil:
    pack_rows(rows, ld, count, HS, NR, dst)


cdef void pack_columns(const float* rows, Py_ssize_t ld, Py_ssize_t count, Py_ssize_t HS, float* dst) noexcept nogil:
    """rows (count, HS) as panels of NR columns: element (k, j) of a panel at k * NR + j, panels count * NR apart."""
    cdef Py_ssize_t j = 0
    while j < HS:
        pack(rows + j, ld, True, HS - j, count, NR, dst + j * count)
        j += NR


cdef inline void fetch_rows(const float* rows, Py_ssize_t ld, Py_ssize_t count, Py_ssize_t HS, Py_ssize_t part,
                            Py_ssize_t parts) noexcept nogil:
    """Asks for one of `parts` parts of rows (count, HS) to be in L2: what the next head will need."""
    cdef Py_ssize_t i = count * part // parts, stop = count * (part + 1) // parts, j
    while i < stop:
        j = 0
        while j < HS:
            prefetch_l2(rows + i * ld + j)
            j += LINE
        i += 1


cdef inline Py_ssize_t packed_size(const Heads* h) noexcept nogil:
    return h.HS * h.Sp + h.HSp * h.S


cdef void pack_head(const Heads* h, Py_ssize_t head, float* packed) noexcept nogil:
    cdef Py_ssize_t at = head // h.NH * h.kv_batch + head % h.NH * h.kv_head
    pack_left(h.k + at, h.kv_row, h.S, h.HS, packed)
    pack_columns(h.v + at, h.kv_row, h.S, h.HS, packed + h.HS * h.Sp)


cdef void softmax_block(float* scores, Py_ssize_t nk, Py_ssize_t nq, Py_ssize_t visible, float scale, float* peak,
                        float* total, float* shrink) noexcept nogil:
    """One block of online softmax, in place: scores[key, query] becomes e^(scale score - new peak).

    `visible` counts the keys of this block that query 0 sees; query j sees j more. peak and total are brought up to
    date; shrink[j] is what the sums so far must be multiplied with."""
    cdef Py_ssize_t j = 0, i, stop, full
    cdef vfloat x, top, before, sum
    cdef vfloat factor = vset1(scale), lowest = vset1(LOWEST)
    while j < nq:
        stop = larger(0, smaller(nk, visible + j + W - 1))      # keys that the last lane sees
        full = larger(0, smaller(stop, visible + j))            # keys that every lane sees
        before = vload(peak + j)
        top = before
        for i in range(full):
            top = vmax(top, vmul(factor, vload(scores + i * BQ + j)))
        for i in range(full, stop):
            x = vfrom_lane(vmul(factor, vload(scores + i * BQ + j)), i - visible - j + 1, lowest)
            vstore(scores + i * BQ + j, x)
            top = vmax(top, x)
        x = vexp(vsub(before, top))
        vstore(shrink + j, x)
        vstore(peak + j, top)
        sum = vmul(vload(total + j), x)
        for i in range(full):
            x = vexp(vsub(vmul(factor, vload(scores + i * BQ + j)), top))
            sum = vadd(sum, x)
            vstore(scores + i * BQ + j, x)
        for i in range(full, stop):
            x = vfrom_lane(vexp(vsub(vload(scores + i * BQ + j), top)), i - visible - j + 1, vset1(0.0))
            sum = vadd(sum, x)
            vstore(scores + i * BQ + j, x)
        for i in range(stop, smaller(nk, stop + MR)):           # tiles of P V read up to MR - 1 keys further
            vstore(scores + i * BQ + j, vset1(0.0))
        vstore(total + j, sum)
        j += W


cdef inline Py_ssize_t block_scratch(const Heads* h) noexcept nogil:
    return BQ * (h.HS + BK + h.HSp + 3)


cdef void attend_block(const Heads* h, Py_ssize_t head, Py_ssize_t q0, const float* packed, float* scratch,
                       bint ahead) noexcept nogil:
    """The outputs of queries q0 .. q0 + BQ - 1 of one head. ahead: the next head of the sequence comes next."""
    cdef Py_ssize_t nq = smaller(BQ, h.T - q0), first_key = h.S - h.T + q0, C = h.NH * h.HS
    cdef Py_ssize_t b = head // h.NH, n = head % h.NH, k0 = 0, nk, i, j, mr, depth
    cdef const float* keys = packed
    cdef const float* values = packed + h.HS * h.Sp
    cdef float* queries = scratch
    cdef float* scores = queries + BQ * h.HS
    cdef float* sums = scores + BQ * BK
    cdef float* peak = sums + BQ * h.HSp
    cdef float* total = peak + BQ
    cdef float* shrink = total + BQ
    cdef float* out
    cdef vfloat x
    cdef const float* q = h.q + b * h.q_batch + n * h.HS + q0 * h.q_row
    cdef const float* k = h.k + b * h.kv_batch + n * h.kv_head + q0 * h.kv_row
    cdef const float* v = k + (h.v - h.k)
    pack_right(q, h.q_row, nq, h.HS, queries)
    for i in range(BQ):
        peak[i] = LOWEST
        total[i] = 0.0
    while k0 <= first_key + nq - 1:
        nk = smaller(BK, h.S - k0)
        i = 0
        while i < nk:
            if ahead and k0 == 0:
                fetch_rows(q + h.HS, h.q_row, nq, h.HS, i // MR, ceil_div(nk, MR))
                fetch_rows(k + h.kv_head, h.kv_row, nq, h.HS, i // MR, ceil_div(nk, MR))
                fetch_rows(v + h.kv_head, h.kv_row, nq, h.HS, i // MR, ceil_div(nk, MR))
            mr = smaller(MR, nk - i)
            j = 0
            while j < nq:
                if k0 + i <= first_key + j + NR - 1:
                    tile_product(mr, h.HS, keys + (k0 + i) * h.HS, MR, queries + j * h.HS, NR, scores + i * BQ + j, BQ,
                                 False)
                j += NR
            i += MR
        softmax_block(scores, nk, nq, first_key + 1 - k0, h.scale, peak, total, shrink)
        if k0 > 0:
            for i in range(nq):
                x = vset1(shrink[i])
                j = 0
                while j < h.HSp:
                    vstore(sums + i * h.HSp + j, vmul(x, vload(sums + i * h.HSp + j)))
                    j += W
        i = 0
        while i < nq:
            mr = smaller(MR, nq - i)
            depth = smaller(nk, first_key + i + MR - k0)
            j = 0
            while j < h.HSp and depth > 0:
                tile_product(mr, depth, scores + i, BQ, values + j * h.S + k0 * NR, NR, sums + i * h.HSp + j, h.HSp,
                             k0 > 0)
                j += NR
            i += MR
        k0 += BK
    for i in range(nq):
        out = h.out + (b * h.T + q0 + i) * C + n * h.HS
        x = vdiv(vset1(1.0), vset1(total[i]))
        j = 0
        while j < h.HS:
            store_some(out + j, vmul(x, vload(sums + i * h.HSp + j)), smaller(W, h.HS - j))
            j += W
    if h.lse != NULL:
        i = 0
        while i < nq:
            x = vadd(vload(peak + i), vlog(vload(total + i)))
            store_some(h.lse + head * h.T + q0 + i, x, smaller(W, nq - i))
            i += W


cdef void attend_row(const Heads* h, Py_ssize_t item, float* scores) noexcept nogil:
    """The output of one query, straight from the cache: a pass over the keys, softmax, a pass over the values."""
    cdef Py_ssize_t head = item // h.T, t = item % h.T, b = head // h.NH, n = head % h.NH
    cdef Py_ssize_t count = h.S - h.T + t + 1, i, j, m
    cdef const float* q = h.q + b * h.q_batch + n * h.HS + t * h.q_row
    cdef const float* k = h.k + b * h.kv_batch + n * h.kv_head
    cdef const float* v = h.v + b * h.kv_batch + n * h.kv_head
    cdef float* out = h.out + (b * h.T + t) * h.NH * h.HS + n * h.HS
    cdef vfloat x, factor, top = vset1(LOWEST), total = vset1(0.0)
    for i in range(count):
        x = vset1(0.0)
        j = 0
        while j < h.HS:
            m = smaller(W, h.HS - j)
            x = vfma(load_some(q + j, m), load_some(k + i * h.kv_row + j, m), x)
            j += W
        scores[i] = vreduce_add(x) * h.scale
        top = vmax(top, vset1(scores[i]))
    i = 0
    while i < count:
        m = smaller(W, count - i)
        x = vkeep_n(vexp(vsub(load_some(scores + i, m), top)), m)
        store_some(scores + i, x, m)
        total = vadd(total, x)
        i += W
    factor = vset1(1.0 / vreduce_add(total))
    j = 0
    while j < h.HS:
        m = smaller(W, h.HS - j)
        x = vset1(0.0)
        for i in range(count):
            x = vfma(vset1(scores[i]), load_some(v + i * h.kv_row + j, m), x)
        store_some(out + j, vmul(x, factor), m)
        j += W


cdef void attend_heads(const Heads* h, Py_ssize_t first, Py_ssize_t stop, Py_ssize_t part, Py_ssize_t parts,
                       float* scratch) noexcept nogil:
    """Every parts-th block of queries of some heads, from the last on, which sees the most keys."""
    cdef Py_ssize_t head, block
    cdef float* packed = scratch + block_scratch(h)
    cdef bint ahead
    for head in range(first, stop):
        pack_head(h, head, packed)
        ahead = h.S <= AHEAD and h.S == h.T and head + 1 < stop and (head + 1) % h.NH > 0
        block = ceil_div(h.T, BQ) - 1 - part
        while block >= 0:
            attend_block(h, head, block * BQ, packed, scratch, ahead)
            block -= parts


cdef inline Py_ssize_t run_of_heads(Py_ssize_t heads, int t) noexcept:
    """Heads of one item: neighbours, so that each can fetch the next, and still some items for each thread."""
    return larger(1, smaller(8, heads // (4 * t)))


cdef int attend(const Heads* h) except -1:
    cdef Py_ssize_t heads = h.B * h.NH, blocks = ceil_div(h.T, BQ), item
    cdef int t = team(<double> heads * h.T * h.S * h.HS, heads * blocks)
    # items are runs of heads, or parts of one: each packs keys and values for itself
    cdef Py_ssize_t run = run_of_heads(heads, t)
    cdef Py_ssize_t parts = 1 if t == 1 else smaller(blocks, ceil_div(3 * t, heads))
    cdef Py_ssize_t size = round_up(block_scratch(h) + packed_size(h), 16)
    cdef Scratch scratch = Scratch(t * size)
    cdef float* work = scratch.floats()
    for item in prange(ceil_div(heads, run) * parts, nogil=True, num_threads=t, schedule="dynamic"):
        attend_heads(h, item // parts * run, smaller(heads, (item // parts + 1) * run), item % parts, parts,
                     work + threadid() * size)
    return 0


def attention_forward(qkv, num_heads, *, out=None, lse=None):
    """out = softmax(mask(q k^T / sqrt(HS))) v per head,  lse = log sum exp of the masked, scaled scores

    qkv: float32 (B, T, 3C), each row [q | k | v], each of the three NH heads of HS channels side by side.
    num_heads: NH; C must be a multiple of it. The mask is causal: position t sees 0..t.
    out: float32 (B, T, C); lse: float32 (B, NH, T), both overwritten. Returns out, lse.
    Backward needs qkv, out and lse. Raises ValueError for a wrong shape, dtype, order or overlap, and for channels that
    the heads do not divide.
    Split over runs of heads, or blocks of queries where heads are few; each thread keeps O(T) floats of its own.
    Source: Dao et al. (2022), arXiv 2205.14135; the result is that of llm.c train_gpt2.c attention_forward.
    """
    cdef Operands arrays = Operands("attention_forward")
    cdef tuple shape = arrays.shape("qkv", qkv, 3, 3)
    cdef Py_ssize_t B = shape[0], T = shape[1], C = shape[2] // 3, NH
    if shape[2] % 3 or not 1 <= num_heads <= C or C % num_heads:
        raise arrays.error(f"qkv must have 3 * num_heads * HS channels, got {shape[2]} with num_heads {num_heads}")
    NH = num_heads
    out, lse = given(out, (B, T, C)), given(lse, (B, NH, T))
    cdef Heads h = new_heads(B, T, T, NH, C // NH)
    h.q = arrays.inp("qkv", qkv, shape)
    h.k, h.v = h.q + C, h.q + 2 * C
    h.q_batch = h.kv_batch = T * 3 * C
    h.q_row = h.kv_row = 3 * C
    h.kv_head = h.HS
    h.out = arrays.out("out", out, (B, T, C))
    h.lse = arrays.out("lse", lse, (B, NH, T))
    arrays.done()
    attend(&h)
    return out, lse


def attention_decode(qkv, key_cache, value_cache, position, *, out=None):
    """out = softmax(mask(q k^T / sqrt(HS))) v over the cached keys and values of positions 0 .. position + n - 1

    qkv: float32 (B, n, 3C), the n new positions position .. position + n - 1 in attention_forward's layout.
    key_cache, value_cache: float32 (B, NH, maxT, HS): the new keys and values are written into them first.
    out: float32 (B, n, C), overwritten. Returns out. There is no backward pass.
    Raises ValueError for a wrong shape, dtype, order or overlap, and for positions beyond maxT.
    Split over heads and, for more than 4 new positions, blocks of queries. Source: attention_forward.
    """
    cdef Operands arrays = Operands("attention_decode")
    cdef tuple shape = arrays.shape("qkv", qkv, 3, 3), cache = arrays.shape("key_cache", key_cache, 4, 4)
    cdef Py_ssize_t B = shape[0], n = shape[1], NH = cache[1], HS = cache[3], C = NH * HS, start
    if shape[2] != 3 * C or B != <Py_ssize_t> cache[0]:
        raise arrays.error(f"qkv must have shape ({cache[0]}, n, {3 * C}) for caches of shape {cache}, got {shape}")
    if not 0 <= position <= cache[2] - n:
        raise arrays.error(f"{n} positions from {position} on do not fit the caches' {cache[2]}")
    start = position
    out = given(out, (B, n, C))
    cdef Heads h = new_heads(B, n, start + n, NH, HS)
    h.q = arrays.inp("qkv", qkv, shape)
    h.q_batch, h.q_row = n * 3 * C, 3 * C
    cdef float* keys = arrays.out("key_cache", key_cache, cache)
    cdef float* values = arrays.out("value_cache", value_cache, cache)
    h.out = arrays.out("out", out, (B, n, C))
    arrays.done()
    h.kv_batch, h.kv_head, h.kv_row = NH * cache[2] * HS, cache[2] * HS, HS
    h.k, h.v = keys, values
    cdef Py_ssize_t head, i, at, item
    for head in range(B * NH):
        for i in range(n):
            at = head * h.kv_head + (start + i) * HS
            memcpy(keys + at, h.q + (head // NH * n + i) * 3 * C + C + head % NH * HS, HS * sizeof(float))
            memcpy(values + at, h.q + (head // NH * n + i) * 3 * C + 2 * C + head % NH * HS, HS * sizeof(float))
    if n > FEW_QUERIES:
        attend(&h)
        return out
    cdef int t = team(2.0 * B * NH * n * h.S * HS, B * NH * n)
    cdef Scratch scratch = Scratch(t * h.S)
    cdef float* scores = scratch.floats()
    for item in prange(B * NH * n, nogil=True, num_threads=t, schedule="static"):
        attend_row(&h, item, scores + threadid() * h.S)
    return out
