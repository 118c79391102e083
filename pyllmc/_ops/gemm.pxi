# The matrix product that matmul and classifier are made of, and the register tile that attention shares with it.
#
#     c (m, n)  =  a (m, k) . b (k, n)          and, per element, in the same pass:
#     + c                                       accumulate
#     + bias[j]                                 bias
#     gelu(...)                                 gelu: c keeps the value before it, out gets the rest
#     + residual                                residual
#     * gelu'(dgelu)                            dgelu
#
# The sums grow in c, slice by slice; the result goes to out, which is c itself unless something has to be kept apart.
#
# As in BLIS (Van Zee & van de Geijn, 2015): a tile of MR x NR sums stays in registers (`tile_product`); it reads a
# panel of MR rows of a and one of NR columns of b, both "by k": element (i, k) at k * width + i. Panels of KC deep
# slices of a and b are packed once, shared by all threads, and so small that b's panel stays in L1 and a block of
# a's in L2. KC fixes the order in which products are added: it never follows the machine or the number of threads,
# and the result has the same bits on every machine that runs the same ISA module.

cdef enum:
    KC = 256        # depth of a slice: a panel of b is KC * NR floats, 16 KiB (AVX2) or 32 KiB (AVX-512) of L1
    MC = 144        # rows of a block of a: MC * KC floats, 144 KiB of L2; a multiple of every MR
    NC = 4096       # columns of b packed at once: NC * KC floats, 4 MiB of L3
    MS = 4032       # rows of a packed at once; a multiple of every MR
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


cdef Product new_product(Py_ssize_t m, Py_ssize_t n, Py_ssize_t k) noexcept:
    cdef Product p
    memset(&p, 0, sizeof(Product))
    p.m = m
    p.n = n
    p.k = k
    p.ldc = n
    return p


cdef inline void tile_product(Py_ssize_t depth, const float* a, Py_ssize_t lda, const float* b, Py_ssize_t ldb,
                              float* c, Py_ssize_t ldc, bint accumulate) noexcept nogil:
    """c[i * ldc + j] (+)= sum over k of a[k * lda + i] * b[k * ldb + j], i < MR, j < NR: all of c in registers."""
    cdef vfloat sums[MR][NRV]
    cdef vfloat row[NRV]
    cdef vfloat scale
    cdef Py_ssize_t i, j, k
    for i in range(MR):
        for j in range(NRV):
            sums[i][j] = vset1(0.0)
    for k in range(depth):
        for j in range(NRV):
            row[j] = vload(b + j * W)
        for i in range(MR):
            scale = vset1(a[i])
            for j in range(NRV):
                sums[i][j] = vfma(scale, row[j], sums[i][j])
        a += lda
        b += ldb
    for i in range(MR):
        for j in range(NRV):
            # c joins at the end: a chain of sums that starts at c would round every product to c's precision
            if accumulate:
                sums[i][j] = vadd(sums[i][j], vload(c + i * ldc + j * W))
            vstore(c + i * ldc + j * W, sums[i][j])


cdef inline void pack(const float* src, Py_ssize_t ld, bint by_k, Py_ssize_t valid, Py_ssize_t depth,
                      Py_ssize_t width, float* dst) noexcept nogil:
    """dst[k * width + i] = element (i, k) of src for k < depth and i < width, 0 for i >= valid.

    `src` points at element (0, 0) of the panel, `valid` counts the rows from there to the end of the matrix."""
    cdef Py_ssize_t i, k, rows, first = 0
    cdef float[W * W] block
    if by_k:
        if valid >= width:
            for k in range(depth):
                memcpy(dst + k * width, src + k * ld, width * sizeof(float))
        else:
            for k in range(depth):
                for i in range(width):
                    dst[k * width + i] = src[k * ld + i] if i < valid else 0.0
        return
    while first < width:
        rows = smaller(W, width - first)
        k = 0
        if valid - first >= W:
            while k + W <= depth:
                if rows == W:
                    vtranspose(src + first * ld + k, ld, dst + k * width + first, width)
                else:
                    vtranspose(src + first * ld + k, ld, block, W)
                    for i in range(W):
                        memcpy(dst + (k + i) * width + first, block + i * W, (width % W) * sizeof(float))
                k += W
        while k < depth:
            for i in range(first, first + rows):
                dst[k * width + i] = src[i * ld + k] if i < valid else 0.0
            k += 1
        first += W


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


cdef struct Slice:
    # the part of a product that is worked on between two packings
    Py_ssize_t i0       # first row, column and depth of the slice, and its extents
    Py_ssize_t j0
    Py_ssize_t k0
    Py_ssize_t rows
    Py_ssize_t columns
    Py_ssize_t depth
    Py_ssize_t mc       # rows of a block
    Py_ssize_t blocks   # items are blocks x groups of column panels
    Py_ssize_t groups
    float* a            # packed panels
    float* b


cdef void pack_item(const Product* p, const Slice* s, Py_ssize_t item, bint is_b) noexcept nogil:
    cdef Py_ssize_t at
    if is_b:
        at = s.j0 + item * NR
        pack(p.b + (s.k0 * p.ldb + at if p.b_by_k else at * p.ldb + s.k0), p.ldb, p.b_by_k, p.n - at, s.depth, NR,
             s.b + item * NR * s.depth)
    else:
        at = s.i0 + item * MR
        pack(p.a + (s.k0 * p.lda + at if p.a_by_k else at * p.lda + s.k0), p.lda, p.a_by_k, p.m - at, s.depth, MR,
             s.a + item * MR * s.depth)


cdef void multiply_item(const Product* p, const Slice* s, Py_ssize_t item) noexcept nogil:
    """One block of rows times one group of column panels of the slice."""
    cdef float[MR * NR] edge
    cdef Py_ssize_t block = item % s.blocks, group = item // s.blocks
    cdef Py_ssize_t panels = ceil_div(s.columns, NR)
    cdef Py_ssize_t j = panels * group // s.groups * NR
    cdef Py_ssize_t j_stop = smaller(s.columns, panels * (group + 1) // s.groups * NR)
    cdef Py_ssize_t i, i_stop = smaller(s.rows, (block + 1) * s.mc), r, mr, nr, n
    cdef bint add = p.accumulate or s.k0 > 0, last = s.k0 + s.depth == p.k
    cdef bint epilogue = last and (p.out != p.c or p.bias != NULL or p.residual != NULL or p.dgelu != NULL)
    cdef float* c
    while j < j_stop:
        nr = smaller(NR, s.columns - j)
        i = block * s.mc
        while i < i_stop:
            mr = smaller(MR, s.rows - i)
            c = p.c + (s.i0 + i) * p.ldc + s.j0 + j
            if mr == MR and nr == NR:
                tile_product(s.depth, s.a + i * s.depth, MR, s.b + j * s.depth, NR, c, p.ldc, add)
            else:
                tile_product(s.depth, s.a + i * s.depth, MR, s.b + j * s.depth, NR, edge, NR, False)
                for r in range(mr):
                    for n in range(nr):
                        c[r * p.ldc + n] = c[r * p.ldc + n] + edge[r * NR + n] if add else edge[r * NR + n]
            if epilogue:
                for r in range(mr):
                    finish(p, s.i0 + i + r, s.j0 + j, nr)
            i += MR
        j += NR


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
    cdef Slice s
    cdef Py_ssize_t item, a_panels, b_panels, items
    cdef int t
    cdef double work = <double> p.m * p.n * p.k
    if p.m <= FEW_ROWS and not p.a_by_k and not p.b_by_k:
        items = ceil_div(p.n, DOT_STRIP)
        t = team(work, items)
        for item in prange(items, nogil=True, num_threads=t, schedule="static"):
            dot_item(p, item)
        return 0
    cdef Scratch packed_a = Scratch(round_up(smaller(p.m, MS), MR) * smaller(p.k, KC))
    cdef Scratch packed_b = Scratch(round_up(smaller(p.n, NC), NR) * smaller(p.k, KC))
    s.a = packed_a.floats()
    s.b = packed_b.floats()
    s.j0 = 0
    while s.j0 < p.n:
        s.columns = smaller(NC, p.n - s.j0)
        b_panels = ceil_div(s.columns, NR)
        s.k0 = 0
        while s.k0 < p.k:
            s.depth = smaller(KC, p.k - s.k0)
            s.i0 = 0
            while s.i0 < p.m:
                s.rows = smaller(MS, p.m - s.i0)
                a_panels = ceil_div(s.rows, MR)
                s.blocks = ceil_div(s.rows, MC)
                s.mc = round_up(ceil_div(s.rows, s.blocks), MR)
                s.blocks = ceil_div(s.rows, s.mc)
                t = team(<double> s.rows * s.columns * s.depth, a_panels * b_panels)
                s.groups = 1 if t == 1 else smaller(b_panels, ceil_div(6 * t, s.blocks))
                # b's panels are packed once a slice of depth, with the first slice of rows
                items = a_panels + (b_panels if s.i0 == 0 else 0)
                for item in prange(items, nogil=True, num_threads=t, schedule="static"):
                    pack_item(p, &s, item if item < a_panels else item - a_panels, item >= a_panels)
                items = s.blocks * s.groups
                for item in prange(items, nogil=True, num_threads=t, schedule="dynamic"):
                    multiply_item(p, &s, item)
                s.i0 += s.rows
            s.k0 += s.depth
        s.j0 += s.columns
    return 0
