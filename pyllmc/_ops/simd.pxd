# What Cython knows of simd.h: the names and how many floats there are, never how wide a register is.
# A vfloat behaves like a float that is only handed on: all arithmetic on it is a call.

cdef extern from "simd.h" nogil:
    const char* PYLLMC_ISA_NAME
    enum:
        W       # floats in a vfloat
        MR      # rows of the register tile
        NRV     # vectors in a row of the register tile
        MC      # rows of a block of packed panels, as many as L2 holds; a multiple of MR
        NR      # columns of the register tile, NRV * W
    ctypedef float vfloat
    ctypedef double vdouble     # of W / 2 doubles
    vfloat vset1(float x) noexcept
    vfloat vload(const float* p) noexcept
    void vstore(float* p, vfloat v) noexcept
    void vstream(float* p, vfloat v) noexcept           # past the caches; p is a multiple of sizeof(vfloat)
    void vstream_end() noexcept                         # by the thread that streamed, before any other reads
    void prefetch(const float* p) noexcept
    void prefetch_l2(const float* p) noexcept
    vfloat vload_n(const float* p, Py_ssize_t n) noexcept               # the first n < W lanes, 0 in the others
    void vstore_n(float* p, vfloat v, Py_ssize_t n) noexcept            # the first n < W lanes only
    vfloat vadd(vfloat a, vfloat b) noexcept
    vfloat vsub(vfloat a, vfloat b) noexcept
    vfloat vmul(vfloat a, vfloat b) noexcept
    vfloat vdiv(vfloat a, vfloat b) noexcept
    vfloat vfma(vfloat a, vfloat b, vfloat c) noexcept                  # a * b + c
    vfloat vmax(vfloat a, vfloat b) noexcept
    vfloat vmin(vfloat a, vfloat b) noexcept
    vfloat vsqrt(vfloat a) noexcept
    vfloat vexp(vfloat a) noexcept
    vfloat vlog(vfloat a) noexcept
    vfloat vfrom_lane(vfloat v, Py_ssize_t first, vfloat other) noexcept
    vfloat vkeep_n(vfloat v, Py_ssize_t n) noexcept
    float vreduce_add(vfloat v) noexcept
    float vreduce_max(vfloat v) noexcept
    vdouble vwiden(const float* p) noexcept                             # of W / 2 floats
    vdouble vzero_wide() noexcept
    vdouble vfma_wide(vdouble a, vdouble b, vdouble c) noexcept
    vdouble vadd_wide(vdouble a, vdouble b) noexcept
    double vreduce_wide(vdouble v) noexcept
    void vtranspose(const float* src, Py_ssize_t lds, float* dst, Py_ssize_t ldd, Py_ssize_t width) noexcept
    void vtranspose_part(const float* src, Py_ssize_t lds, Py_ssize_t rows, Py_ssize_t columns, float* dst,
                         Py_ssize_t ldd, Py_ssize_t width) noexcept

cdef extern from "threads.h" nogil:
    enum:
        PYLLMC_OPENMP
    int omp_threads() noexcept
    void set_omp_threads(int n) noexcept
    void wait_for_team() noexcept       # within a parallel region: until all of its threads are here
