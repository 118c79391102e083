# What Cython knows of simd.h: the names and how many floats there are, never how wide a register is.
# A vfloat behaves like a float that is only handed on: all arithmetic on it is a call.

cdef extern from "simd.h" nogil:
    const char* PYLLMC_ISA_NAME
    enum:
        W       # floats in a vfloat
        MR      # rows of the register tile
        NRV     # vectors in a row of the register tile
        NR      # columns of the register tile, NRV * W
    ctypedef float vfloat
    vfloat vset1(float x) noexcept
    vfloat vload(const float* p) noexcept
    void vstore(float* p, vfloat v) noexcept
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
    double vsum_squares(vfloat v) noexcept
    void vtranspose(const float* src, Py_ssize_t lds, float* dst, Py_ssize_t ldd) noexcept

cdef extern from "threads.h" nogil:
    enum:
        PYLLMC_OPENMP
    int omp_threads() noexcept
    void set_omp_threads(int n) noexcept
