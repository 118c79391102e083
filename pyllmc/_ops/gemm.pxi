# The matrix product that matmul and classifier are made of, and the register tile that attention shares with it.
#
#     c (m, n)  =  a (m, k) . b (k, n)          and, per element, in the same pass:
#     + c                                       accumulate
#     + bias[j]                                 bias
#     gelu(...)                                 gelu: c keeps the value before it, out gets the rest
#     + residual                                residual
#     * gelu'(dgelu)                            dgelu
# and beside it, while a is packed:
#     sums[i] (+)= sum over k of a[i, k]        sums
#
# The sums grow in c, slice by slice; the result goes to out, which is c itself unless something has to be kept apart.
#
# As in BLIS (Van Zee & van de Geijn, 2015): a tile of MR x NR sums stays in registers (`tile_product`); it reads a
# panel of MR rows of a and one of NR columns of b, both "by k": element (i, k) at k * width + i, in slices KC deep.
# Panels of a are packed once, for all threads, and a block of MC rows of them stays in L2. Unlike there, a panel of b
# is packed by the thread that multiplies with it, just before it does: it goes to L1 and no further, and while it is
# worked on, the next one's source is fetched. KC fixes the order in which products are added: it never follows the
# machine or the number of threads, and the result has the same bits on every machine that runs the same ISA module.

cdef enum:
    KC = 256        # depth of a slice: a panel of b is KC * NR floats, 16 KiB (AVX2) or 32 KiB (AVX-512) of L1
    PACKED_A = 1048576  # floats of a packed at once: 4 MiB of L3
    ITEMS = 12      # of a product for each thread: some may be slower than others
    SUM_CHAIN = 16  # terms of a running sum of a's rows
    FEW_ROWS = 8    # up to so many rows a product is limited by reading b once: no packing pays
    DOT_STRIP = 16      # columns of one item of such a product
    DOT_COLUMNS = 4     # of them at a time


cdef struct Product:
    Py_ssize_t m
    Py_ssize_t n
    Py_ssize_t k
    const float* a          # (m, k) at a[i * lda + k], or at a[k * lda + i] where a_by_k
    Py_ssize_t lda
    bint a_by_k
    const float* b          # (k, n) at b[j * ldb + k], or at b[k * ldb + j] where b_by_k
    Py_ssize_t ldb
    bint b_by_k
    float* c                # (m, n), rows `ldc` apart, like out, residual and dgelu
    float* out
    Py_ssize_t ldc
    bint accumulate
    bint gelu
    const float* bias       # these may be NULL
    const float* residual
    const float* dgelu
    float* sums             # (m)


cdef Product new_product(Py_ssize_t m, Py_ssize_t n, Py_ssize_t k) noexcept:
    cdef Product p
    memset(&p, 0, sizeof(Product))
    p.m = m
    p.n = n
    p.k = k
    p.ldc = n
    return p


cdef inline void tile_rows(int rows, Py_ssize_t depth, const float* a, Py_ssize_t lda, const float* b, Py_ssize_t ldb,
                           float* c, Py_ssize_t ldc, bint accumulate) noexcept nogil:
    """tile_product for a number of rows that the compiler knows: all of c is in registers."""
    cdef vfloat sums[MR][NRV]
    cdef vfloat row[NRV]
    cdef vfloat scale
    cdef Py_ssize_t i, j, k
    for i in range(rows):
        for j in range(NRV):
            sums[i][j] = vset1(0.0)
    for k in range(depth):
        for j in range(NRV):
            row[j] = vload(b + j * W)
        for i in range(rows):
            scale = vset1(a[i])
            for j in range(NRV):
                sums[i][j] = vfma(scale, row[j], sums[i][j])
        a += lda
        b += ldb
    # c joins at the end: a chain of sums that starts at c would round every product to c's precision. Two loops: with
    # the condition inside one, gcc 12 keeps the sums in memory.
    if accumulate:
        for i in range(rows):
            for j in range(NRV):
                vstore(c + i * ldc + j * W, vadd(sums[i][j], vload(c + i * ldc + j * W)))
    else:
        for i in range(rows):
            for j in range(NRV):
                vstore(c + i * ldc + j * W, sums[i][j])


cdef inline Py_ssize_t tile_height(Py_ssize_t rows) noexcept nogil:
    """Rows that tile_product computes of a tile of which `rows` are wanted: all MR, or about two thirds or one."""
    return MR // 3 if rows <= MR // 3 else 2 * MR // 3 if rows <= 2 * MR // 3 else MR


cdef void tile_product(Py_ssize_t rows, Py_ssize_t depth, const float* a, Py_ssize_t lda, const float* b,
                       Py_ssize_t ldb, float* c, Py_ssize_t ldc, bint accumulate) noexcept nogil:
    """c[i * ldc + j] (+)= sum over k of a[k * lda + i] * b[k * ldb + j], i < tile_height(rows), j < NR; rows <= MR."""
    # A loop of one turn: gcc 12 unrolls only loops within loops so early that arrays can become registers.
    while rows > 0:
        if rows > 2 * MR // 3:
            tile_rows(MR, depth, a, lda, b, ldb, c, ldc, accumulate)
        elif rows > MR // 3:
            tile_rows(2 * MR // 3, depth, a, lda, b, ldb, c, ldc, accumulate)
        else:
            tile_rows(MR // 3, depth, a, lda, b, ldb, c, ldc, accumulate)
        rows -= MR


cdef inline void pack(const float* src, Py_ssize_t ld, bint by_k, Py_ssize_t valid, Py_ssize_t depth,
                      Py_ssize_t width, float* dst) noexcept nogil:
    """dst[k * width + i] = element (i, k) of src for k < depth and i < width, 0 for i >= valid.

    `src` points at element (0, 0) of the panel, `valid` counts the rows from there to the end of the matrix."""
    cdef Py_ssize_t k, j, n, first = 0
    if by_k:
        for k in range(depth):
            if valid >= width:
                copy_row(src + k * ld, dst + k * width, width)
            else:
                j = 0
                while j < width:
                    n = smaller(W, width - j)
                    store_some(dst + k * width + j, load_some(src + k * ld + j, n) if j + n <= valid
                               else vload_n(src + k * ld + j, larger(0, valid - j)), n)
                    j += W
        return
    while first < width:
        k = 0
        if valid - first >= W:
            while k + W <= depth:
                vtranspose(src + first * ld + k, ld, dst + k * width + first, width, smaller(W, width - first))
                k += W
        while k < depth:
            vtranspose_part(src + first * ld + k, ld, valid - first, smaller(W, depth - k), dst + k * width + first,
                            width, smaller(W, width - first))
            k += W
        first += W


cdef inline void copy_row(const float* src, float* dst, Py_ssize_t width) noexcept nogil:
    cdef Py_ssize_t j = 0
    while j + W <= width:
        vstore(dst + j, vload(src + j))
        j += W
    if j < width:
        vstore_n(dst + j, vload_n(src + j, width - j), width - j)


cdef inline void finish(const Product* p, Py_ssize_t i, Py_ssize_t j, Py_ssize_t count) noexcept nogil:
    """The last pass over c[i, j : j + count], while it is still in L1: bias, GELU, residual or GELU's derivative."""
    cdef Py_ssize_t at = i * p.ldc + j, s = 0, n
    cdef vfloat x
    while s < count:
        n = smaller(W, count - s)
        x = load_some(p.c + at + s, n)
        if p.bias != NULL:
            x = vadd(x, load_some(p.bias + j + s, n))
        if p.gelu:
            store_some(p.c + at + s, x, n)
            x = gelu(x)
        if p.residual != NULL:
            x = vadd(x, load_some(p.residual + at + s, n))
        if p.dgelu != NULL:
            x = vmul(x, gelu_slope(load_some(p.dgelu + at + s, n)))
        store_some(p.out + at + s, x, n)
        s += W


cdef struct Region:
    # the part of a product that is worked on between two packings of a
    Py_ssize_t i0       # first row and depth, and their extents
    Py_ssize_t k0
    Py_ssize_t rows
    Py_ssize_t depth
    Py_ssize_t panels   # of MR rows
    Py_ssize_t mc       # rows of a block
    Py_ssize_t blocks   # items are blocks x groups of column panels
    Py_ssize_t groups
    float* a            # packed: slice by slice of KC deep, in each panel by panel
    float* sums         # of a's rows, slice by slice (slices of the region, m)


cdef inline const float* left(const Product* p, Py_ssize_t i, Py_ssize_t k) noexcept nogil:
    return p.a + (k * p.lda + i if p.a_by_k else i * p.lda + k)


cdef inline const float* right(const Product* p, Py_ssize_t k, Py_ssize_t j) noexcept nogil:
    return p.b + (k * p.ldb + j if p.b_by_k else j * p.ldb + k)


cdef void pack_item(const Product* p, const Region* r, Py_ssize_t item) noexcept nogil:
    """One panel of one slice of a."""
    cdef Py_ssize_t k = item // r.panels * KC, i = item % r.panels * MR, depth = smaller(KC, r.depth - k)
    cdef float* panel = r.a + k * r.panels * MR + i * depth
    pack(left(p, r.i0 + i, r.k0 + k), p.lda, p.a_by_k, r.rows - i, depth, MR, panel)
    if p.sums != NULL:
        sum_panel(panel, depth, smaller(MR, r.rows - i), r.sums + k // KC * p.m + r.i0 + i)


cdef inline void sum_panel(const float* panel, Py_ssize_t depth, Py_ssize_t rows, float* sums) noexcept nogil:
    """sums[i] = sum over k of a packed panel of `rows` <= MR rows."""
    cdef vfloat total, x
    cdef Py_ssize_t i = 0, k, first, n
    while i < rows:
        n = smaller(W, rows - i)
        total = vset1(0.0)
        first = 0
        while first < depth:        # in short chains: a long one of numbers of one sign loses precision
            x = vset1(0.0)
            for k in range(first, smaller(depth, first + SUM_CHAIN)):
                x = vadd(x, load_some(panel + k * MR + i, n))
            total = vadd(total, x)
            first += SUM_CHAIN
        store_some(sums + i, total, n)
        i += W


cdef inline void prefetch_row(const float* row, Py_ssize_t width) noexcept nogil:
    cdef Py_ssize_t i = 0
    while i < width:
        prefetch(row + i)
        i += LINE
    prefetch(row + width - 1)       # on one more line, where the row does not begin with one


cdef inline void prefetch_panel(const Product* p, Py_ssize_t k, Py_ssize_t depth, Py_ssize_t j, Py_ssize_t part,
                                Py_ssize_t parts) noexcept nogil:
    """Asks for one of `parts` parts of a panel of b: its lines shall be near when it is packed."""
    cdef Py_ssize_t rows = depth if p.b_by_k else smaller(NR, p.n - j), width = NR if p.b_by_k else depth
    cdef Py_ssize_t i = rows * part // parts, stop = rows * (part + 1) // parts
    cdef const float* src = right(p, k, j)
    while i < stop:
        prefetch_row(src + i * p.ldb, width)
        i += 1


cdef inline void add_row(const float* src, float* dst, Py_ssize_t count, bint add) noexcept nogil:
    """dst (+)= src"""
    cdef Py_ssize_t s = 0, n
    cdef vfloat x
    while s < count:
        n = smaller(W, count - s)
        x = load_some(src + s, n)
        if add:
            x = vadd(x, load_some(dst + s, n))
        store_some(dst + s, x, n)
        s += W


cdef void multiply_item(const Product* p, const Region* r, Py_ssize_t item, float* b) noexcept nogil:
    """One block of rows times one group of column panels of b, each of which is packed to `b` and used at once."""
    cdef float[MR * NR] edge
    cdef Py_ssize_t block = item % r.blocks, group = item // r.blocks, panels = ceil_div(p.n, NR)
    cdef Py_ssize_t j_start = panels * group // r.groups * NR
    cdef Py_ssize_t j_stop = smaller(p.n, panels * (group + 1) // r.groups * NR)
    cdef Py_ssize_t i_start = block * r.mc, i_stop = smaller(r.rows, i_start + r.mc)
    cdef Py_ssize_t k = 0, i, j, mr, nr, depth, next_k, next_j, row
    cdef bint add, epilogue
    cdef float* c
    cdef const float* a
    while k < r.depth:
        depth = smaller(KC, r.depth - k)
        a = r.a + k * r.panels * MR
        add = p.accumulate or r.k0 + k > 0
        epilogue = r.k0 + k + depth == p.k and (p.out != p.c or p.bias != NULL or p.residual != NULL
                                                or p.dgelu != NULL)
        j = j_start
        while j < j_stop:
            nr = smaller(NR, p.n - j)
            pack(right(p, r.k0 + k, j), p.ldb, p.b_by_k, nr, depth, NR, b)
            next_j, next_k = j + NR, k
            if next_j >= j_stop:
                next_j, next_k = j_start, k + KC
            i = i_start
            while i < i_stop:
                mr = smaller(MR, i_stop - i)
                c = p.c + (r.i0 + i) * p.ldc + j
                for row in range(mr):
                    prefetch_row(c + row * p.ldc, NR)
                if next_k < r.depth:
                    prefetch_panel(p, r.k0 + next_k, smaller(KC, r.depth - next_k), next_j, (i - i_start) // MR,
                                   ceil_div(i_stop - i_start, MR))
                if mr == tile_height(mr) and nr == NR:
                    tile_product(mr, depth, a + i * depth, MR, b, NR, c, p.ldc, add)
                else:
                    tile_product(mr, depth, a + i * depth, MR, b, NR, edge, NR, False)
                    for row in range(mr):
                        add_row(edge + row * NR, c + row * p.ldc, nr, add)
                if epilogue:
                    for row in range(mr):
                        finish(p, r.i0 + i + row, j, nr)
                i += MR
            j += NR
        k += KC


cdef void dot_item(const Product* p, Py_ssize_t item) noexcept nogil:
    """Columns item * DOT_STRIP .. of a product of few rows: dot products of rows of a and b where they lie."""
    cdef Py_ssize_t j = item * DOT_STRIP, j_stop = smaller(p.n, j + DOT_STRIP), first = j, i, k, n, q
    cdef Py_ssize_t stop
    cdef const float* row[DOT_COLUMNS]
    cdef vfloat sums[DOT_COLUMNS]
    cdef vfloat totals[DOT_COLUMNS]
    cdef vfloat x
    cdef float value
    while j < j_stop:
        n = smaller(DOT_COLUMNS, j_stop - j)
        for q in range(DOT_COLUMNS):
            row[q] = p.b + smaller(j + q, p.n - 1) * p.ldb      # past the last column: its row again, not stored
        for i in range(p.m):
            for q in range(DOT_COLUMNS):
                totals[q] = vset1(0.0)
            k = 0
            while k < p.k:
                # in slices of KC, as the tiles are: one long chain of sums would lose precision
                stop = smaller(p.k, k + KC)
                for q in range(DOT_COLUMNS):
                    sums[q] = vset1(0.0)
                while k + W <= stop:
                    x = vload(p.a + i * p.lda + k)
                    for q in range(DOT_COLUMNS):
                        sums[q] = vfma(x, vload(row[q] + k), sums[q])
                    k += W
                if k < stop:
                    x = vload_n(p.a + i * p.lda + k, stop - k)
                    for q in range(DOT_COLUMNS):
                        sums[q] = vfma(x, vload_n(row[q] + k, stop - k), sums[q])
                    k = stop
                for q in range(DOT_COLUMNS):
                    totals[q] = vadd(totals[q], sums[q])
            for q in range(n):
                value = vreduce_add(totals[q])
                p.c[i * p.ldc + j + q] = p.c[i * p.ldc + j + q] + value if p.accumulate else value
        j += DOT_COLUMNS
    for i in range(p.m):
        finish(p, i, first, j_stop - first)


cdef int gemm(const Product* p) except -1:
    cdef Region r
    cdef Py_ssize_t item, items
    cdef int t
    cdef double work = <double> p.m * p.n * p.k
    if p.m <= FEW_ROWS and not p.a_by_k and not p.b_by_k:
        items = ceil_div(p.n, DOT_STRIP)
        t = team(work, items)
        for item in prange(items, nogil=True, num_threads=t, schedule="static"):
            dot_item(p, item)
        return 0
    cdef Py_ssize_t tall = smaller(p.m, larger(1, PACKED_A // p.k // MC) * MC)
    cdef Py_ssize_t deep = smaller(p.k, larger(1, PACKED_A // round_up(tall, MR) // KC) * KC)
    cdef Py_ssize_t panels = ceil_div(p.n, NR)
    t = team(work, ceil_div(p.m, MR) * panels)
    cdef Scratch packed_a = Scratch(round_up(tall, MR) * deep), packed_b = Scratch(t * KC * NR)
    cdef Scratch sums = Scratch(ceil_div(deep, KC) * p.m if p.sums != NULL else 0)
    cdef float* b = packed_b.floats()
    r.a = packed_a.floats()
    r.sums = sums.floats()
    r.k0 = 0
    while r.k0 < p.k:
        r.depth = smaller(deep, p.k - r.k0)
        r.i0 = 0
        while r.i0 < p.m:
            r.rows = smaller(tall, p.m - r.i0)
            r.panels = ceil_div(r.rows, MR)
            r.blocks = ceil_div(r.rows, MC)
            r.mc = round_up(ceil_div(r.rows, r.blocks), MR)
            r.blocks = ceil_div(r.rows, r.mc)
            r.groups = smaller(panels, ceil_div(ITEMS * t, r.blocks))
            with nogil, parallel(num_threads=t):
                for item in prange(r.panels * ceil_div(r.depth, KC), schedule="static"):
                    pack_item(p, &r, item)
                wait_for_team()     # a prange in a parallel region does not
                for item in prange(r.blocks * r.groups, schedule="dynamic"):
                    multiply_item(p, &r, item, b + threadid() * KC * NR)
            r.i0 += r.rows
        if p.sums != NULL:
            add_partials(r.sums, ceil_div(r.depth, KC), p.m, p.sums, p.accumulate or r.k0 > 0)
        r.k0 += r.depth
    return 0
