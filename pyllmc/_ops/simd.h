/* The vector vocabulary: one name for each thing the ops do with a register full of floats.
 *
 * Every op is written once, over these names; each ISA module (_baseline, _avx2, _avx512) compiles it with its own
 * flags, and the width follows from those flags. `W` is the number of floats in a `vfloat`, MR x (NRV * W) the tile
 * that gemm.pxi keeps in registers. No operator is applied to a vector outside this file: an ISA needs the short
 * block of intrinsics below, nothing else.
 *
 * Rounding: built with -ffp-contract=off, so that a product and a sum fuse exactly where vfma says so, whatever the
 * compiler and its version.
 */
#ifndef PYLLMC_SIMD_H
#define PYLLMC_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define PYLLMC_ISA_NAME "avx512"
enum { W = 16, MR = 12, NRV = 2, MC = 528 }; /* 24 accumulators + 2 of b + 1 of a, of 32 registers */
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define PYLLMC_ISA_NAME "avx2"
enum { W = 8, MR = 6, NRV = 2, MC = 288 }; /* 12 accumulators + 2 of b + 1 of a, of 16 registers */
#elif defined(__SSE2__)
#include <emmintrin.h>
#define PYLLMC_ISA_NAME "sse2"
enum { W = 4, MR = 4, NRV = 2, MC = 288 }; /* 8 accumulators + 2 of b + the product, of 16 registers */
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define PYLLMC_ISA_NAME "neon"
enum { W = 4, MR = 8, NRV = 2, MC = 288 }; /* 16 accumulators + 2 of b + 1 of a, of 32 registers */
#else
#error "pyllmc needs SSE2, AVX2, AVX-512 or NEON"
#endif

enum { NR = NRV * W };

typedef float vfloat __attribute__((vector_size(sizeof(float) * W)));
typedef int32_t vint __attribute__((vector_size(sizeof(int32_t) * W)));
typedef vfloat vfloat_unaligned __attribute__((aligned(4), may_alias));
typedef double vdouble __attribute__((vector_size(sizeof(float) * W)));
typedef float vhalf_unaligned __attribute__((vector_size(sizeof(float) * W / 2), aligned(4), may_alias));

#define VINLINE static inline __attribute__((always_inline, unused))

/* ---- the part that differs between instruction sets ------------------------------------------------------------ */

#if defined(__AVX512F__)

VINLINE vfloat vset1(float x) { return (vfloat)_mm512_set1_ps(x); }
VINLINE vfloat vfma(vfloat a, vfloat b, vfloat c) { return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
VINLINE vdouble vfma_wide(vdouble a, vdouble b, vdouble c)
{
    return (vdouble)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
VINLINE vfloat vscale2(vfloat x, vfloat n) { return (vfloat)_mm512_scalef_ps((__m512)x, (__m512)n); }
VINLINE vfloat vmax(vfloat a, vfloat b) { return (vfloat)_mm512_max_ps((__m512)a, (__m512)b); }
VINLINE vfloat vmin(vfloat a, vfloat b) { return (vfloat)_mm512_min_ps((__m512)a, (__m512)b); }
VINLINE vfloat vsqrt(vfloat a) { return (vfloat)_mm512_sqrt_ps((__m512)a); }
VINLINE void vstream(float *p, vfloat v) { _mm512_stream_ps(p, (__m512)v); }
VINLINE void vstream_end(void) { _mm_sfence(); }
VINLINE __mmask16 lanes(Py_ssize_t n) { return (__mmask16)((1u << n) - 1); }
VINLINE vfloat vload_n(const float *p, Py_ssize_t n) { return (vfloat)_mm512_maskz_loadu_ps(lanes(n), p); }
VINLINE void vstore_n(float *p, vfloat v, Py_ssize_t n) { _mm512_mask_storeu_ps(p, lanes(n), (__m512)v); }

#elif defined(__AVX2__)

VINLINE vfloat vset1(float x) { return (vfloat)_mm256_set1_ps(x); }
VINLINE vfloat vfma(vfloat a, vfloat b, vfloat c) { return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
VINLINE vdouble vfma_wide(vdouble a, vdouble b, vdouble c)
{
    return (vdouble)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
VINLINE vfloat vmax(vfloat a, vfloat b) { return (vfloat)_mm256_max_ps((__m256)a, (__m256)b); }
VINLINE vfloat vmin(vfloat a, vfloat b) { return (vfloat)_mm256_min_ps((__m256)a, (__m256)b); }
VINLINE vfloat vsqrt(vfloat a) { return (vfloat)_mm256_sqrt_ps((__m256)a); }
VINLINE void vstream(float *p, vfloat v) { _mm256_stream_ps(p, (__m256)v); }
VINLINE void vstream_end(void) { _mm_sfence(); }
VINLINE __m256i lanes(Py_ssize_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
VINLINE vfloat vload_n(const float *p, Py_ssize_t n) { return (vfloat)_mm256_maskload_ps(p, lanes(n)); }
VINLINE void vstore_n(float *p, vfloat v, Py_ssize_t n) { _mm256_maskstore_ps(p, lanes(n), (__m256)v); }

#else

#if defined(__SSE2__)
VINLINE vfloat vset1(float x) { return (vfloat)_mm_set1_ps(x); }
VINLINE vfloat vfma(vfloat a, vfloat b, vfloat c) { return a * b + c; } /* SSE2 has no fused form: two roundings */
VINLINE vfloat vmax(vfloat a, vfloat b) { return (vfloat)_mm_max_ps((__m128)a, (__m128)b); }
VINLINE vfloat vmin(vfloat a, vfloat b) { return (vfloat)_mm_min_ps((__m128)a, (__m128)b); }
VINLINE vfloat vsqrt(vfloat a) { return (vfloat)_mm_sqrt_ps((__m128)a); }
VINLINE void vstream(float *p, vfloat v) { _mm_stream_ps(p, (__m128)v); }
VINLINE void vstream_end(void) { _mm_sfence(); }
#else
VINLINE vfloat vset1(float x) { return (vfloat)vdupq_n_f32(x); }
VINLINE vfloat vfma(vfloat a, vfloat b, vfloat c)
{
    return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
/* as on x86: where one of the two is a NaN, the second operand is the result */
VINLINE vfloat vmax(vfloat a, vfloat b)
{
    return (vfloat)vbslq_f32(vcgtq_f32((float32x4_t)a, (float32x4_t)b), (float32x4_t)a, (float32x4_t)b);
}
VINLINE vfloat vmin(vfloat a, vfloat b)
{
    return (vfloat)vbslq_f32(vcltq_f32((float32x4_t)a, (float32x4_t)b), (float32x4_t)a, (float32x4_t)b);
}
VINLINE vfloat vsqrt(vfloat a) { return (vfloat)vsqrtq_f32((float32x4_t)a); }
VINLINE void vstream(float *p, vfloat v) { *(vfloat *)p = v; } /* nothing on aarch64 promises more */
VINLINE void vstream_end(void) {}
#endif
VINLINE vdouble vfma_wide(vdouble a, vdouble b, vdouble c) { return a * b + c; }
VINLINE vfloat vload_n(const float *p, Py_ssize_t n)
{
    float lane[W] = {0};
    memcpy(lane, p, (size_t)n * sizeof(float));
    return *(const vfloat_unaligned *)lane;
}
VINLINE void vstore_n(float *p, vfloat v, Py_ssize_t n) { memcpy(p, &v, (size_t)n * sizeof(float)); }

#endif

/* ---- the part that is the same everywhere ---------------------------------------------------------------------- */

VINLINE vfloat vload(const float *p) { return *(const vfloat_unaligned *)p; }
VINLINE void vstore(float *p, vfloat v) { *(vfloat_unaligned *)p = v; }
/* asks for the cache line of p, to be in L1 or in L2 soon: of no effect on results, nor where p is no valid address */
VINLINE void prefetch(const float *p) { __builtin_prefetch(p, 0, 3); }
VINLINE void prefetch_l2(const float *p) { __builtin_prefetch(p, 0, 2); }
VINLINE vfloat vadd(vfloat a, vfloat b) { return a + b; }
VINLINE vfloat vsub(vfloat a, vfloat b) { return a - b; }
VINLINE vfloat vmul(vfloat a, vfloat b) { return a * b; }
VINLINE vfloat vdiv(vfloat a, vfloat b) { return a / b; }

VINLINE vfloat vselect(vint mask, vfloat a, vfloat b) { return (vfloat)(((vint)a & mask) | ((vint)b & ~mask)); }

/* 0, 1, 2, ... W-1 */
VINLINE vfloat viota(void)
{
    vfloat v;
    for (int i = 0; i < W; i++) v[i] = (float)i;
    return v;
}

/* `v` in the lanes whose number is at least `first`, `other` in those below (first may lie outside 0..W) */
VINLINE vfloat vfrom_lane(vfloat v, Py_ssize_t first, vfloat other)
{
    return vselect(viota() >= vset1((float)first), v, other);
}

/* the first n lanes of v, 0 in the others */
VINLINE vfloat vkeep_n(vfloat v, Py_ssize_t n) { return vselect(viota() < vset1((float)n), v, vset1(0.0f)); }

/* VSHUFFLE(a, b, i, j, ...): elements i, j, ... of a followed by b. GCC before 12 has no __builtin_shufflevector. */
#if defined(__clang__)
#define VSHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VSHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vint){__VA_ARGS__})
#endif
#define TWICE(...) __VA_ARGS__, __VA_ARGS__

/* Sum and maximum over the lanes, as a tree that folds the upper half onto the lower one until one lane is left: the
 * order is part of the promise of equal bits. */
#if defined(__AVX512F__)
#define FOLD(op, v) \
    v = op(v, VSHUFFLE(v, v, TWICE(8, 9, 10, 11, 12, 13, 14, 15))); \
    v = op(v, VSHUFFLE(v, v, TWICE(TWICE(4, 5, 6, 7)))); \
    v = op(v, VSHUFFLE(v, v, TWICE(TWICE(TWICE(2, 3))))); \
    v = op(v, VSHUFFLE(v, v, TWICE(TWICE(TWICE(1, 1)))))
#elif defined(__AVX2__)
#define FOLD(op, v) \
    v = op(v, VSHUFFLE(v, v, TWICE(4, 5, 6, 7))); \
    v = op(v, VSHUFFLE(v, v, TWICE(TWICE(2, 3)))); \
    v = op(v, VSHUFFLE(v, v, TWICE(TWICE(1, 1))))
#else
#define FOLD(op, v) \
    v = op(v, VSHUFFLE(v, v, TWICE(2, 3))); \
    v = op(v, VSHUFFLE(v, v, TWICE(1, 1)))
#endif
VINLINE float vreduce_add(vfloat v)
{
    FOLD(vadd, v);
    return v[0];
}
VINLINE float vreduce_max(vfloat v)
{
    FOLD(vmax, v);
    return v[0];
}

/* Sums that must not be rounded to float: W / 2 floats from memory, widened */
VINLINE vdouble vwiden(const float *p) { return __builtin_convertvector(*(const vhalf_unaligned *)p, vdouble); }
VINLINE vdouble vzero_wide(void) { return (vdouble){0.0}; }
VINLINE vdouble vadd_wide(vdouble a, vdouble b) { return a + b; }
VINLINE double vreduce_wide(vdouble v)
{
    double sum = 0.0;
    for (int i = 0; i < W / 2; i++) sum += v[i];
    return sum;
}

#if !defined(__AVX512F__)
/* 2^n for n in -126..127, from the exponent bits */
VINLINE vfloat vpow2(vint n) { return (vfloat)((n + 127) << 23); }
/* x 2^n for a whole n in -151..128: in two steps, of which only the second rounds, where the result is denormal */
VINLINE vfloat vscale2(vfloat x, vfloat n)
{
    vint e = __builtin_convertvector(n, vint);
    vint half = e >> 1;
    return x * vpow2(half) * vpow2(e - half);
}
#endif

/* e^x, at most 1.1 ulp off over all floats (tests/test_simd.py): x = n ln 2 + r, e^r by a polynomial of degree 6
 * fitted to the interval (relative error 3e-9). */
VINLINE vfloat vexp(vfloat x)
{
    const vfloat shift = vset1(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    x = vmin(vset1(88.8f), vmax(vset1(-104.0f), x)); /* in this order of operands a NaN stays one */
    vfloat n = vfma(x, vset1(1.44269504088896341f), shift) - shift;
    vfloat r = vfma(n, vset1(-0.693145751953125f), x);
    r = vfma(n, vset1(-1.42860682030941723e-6f), r);
    vfloat p = vset1(0.0013950603315606713f);
    p = vfma(p, r, vset1(0.008368953131139278f));
    p = vfma(p, r, vset1(0.04166620597243309f));
    p = vfma(p, r, vset1(0.166665181517601f));
    p = vfma(p, r, vset1(0.5f));
    p = vfma(p, r * r, r) + vset1(1.0f);
    return vscale2(p, n);
}

/* ln x, at most 2 ulp off: x = 2^e m with m in [sqrt(1/2), sqrt(2)), ln m = f - f^2/2 + f^3 P(f), f = m - 1,
 * P of degree 8. ln 0 = -inf, a negative x gives NaN, inf and NaN are themselves. */
VINLINE vfloat vlog(vfloat x)
{
    const vfloat one = vset1(1.0f);
    vint tiny = x < vset1(1.17549435e-38f);
    vfloat y = vselect(tiny, x * vset1(8388608.0f), x);
    vint bits = (vint)y - 0x3f3504f3; /* the pattern of sqrt(1/2), so that the exponent steps there */
    vint e = bits >> 23;
    vfloat m = (vfloat)((vint)y - (e << 23));
    vfloat ef = __builtin_convertvector(e, vfloat) - vselect(tiny, vset1(23.0f), vset1(0.0f));
    vfloat f = m - one;
    vfloat p = vset1(0.06915540993213654f);
    p = vfma(p, f, vset1(-0.11789864301681519f));
    p = vfma(p, f, vset1(0.11872925609350204f));
    p = vfma(p, f, vset1(-0.12384334951639175f));
    p = vfma(p, f, vset1(0.14218664169311523f));
    p = vfma(p, f, vset1(-0.16669252514839172f));
    p = vfma(p, f, vset1(0.20002226531505585f));
    p = vfma(p, f, vset1(-0.24999986588954926f));
    p = vfma(p, f, vset1(0.3333331048488617f));
    vfloat f2 = f * f;
    vfloat tail = vfma(p * f, f2, ef * vset1(-2.12194440e-4f)); /* ln 2 = 0.693359375 - 2.1219444e-4 */
    tail = vfma(vset1(-0.5f), f2, tail);
    vfloat value = vfma(ef, vset1(0.693359375f), f + tail);
    value = vselect(x == vset1(0.0f), vset1(-INFINITY), value);
    value = vselect(x < vset1(0.0f), vset1(NAN), value);
    return vselect(x < vset1(INFINITY), value, x); /* inf and NaN */
}

/* a0 b0 a1 b1 ... from the lower and from the upper halves of a and b */
#if defined(__AVX512F__)
#define LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define UPPER 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOWER 0, 4, 1, 5
#define UPPER 2, 6, 3, 7
#endif

/* Rows become columns: log2(W) rounds of interleaving row i with row i + W/2, each of which moves one bit of the row
 * number into the column number. */
VINLINE void vtranspose_rows(vfloat *row)
{
    vfloat next[W];
    for (int round = 1; round < W; round *= 2) {
        for (int i = 0; i < W / 2; i++) {
            next[2 * i] = VSHUFFLE(row[i], row[i + W / 2], LOWER);
            next[2 * i + 1] = VSHUFFLE(row[i], row[i + W / 2], UPPER);
        }
        for (int i = 0; i < W; i++) row[i] = next[i];
    }
}
/* dst[j * ldd + i] = src[i * lds + j] for j < W and i < width <= W; W rows of src are read */
VINLINE void vtranspose(const float *src, Py_ssize_t lds, float *dst, Py_ssize_t ldd, Py_ssize_t width)
{
    vfloat row[W];
    for (int i = 0; i < W; i++) row[i] = vload(src + i * lds);
    vtranspose_rows(row);
    for (int i = 0; i < W; i++) {
        if (width < W) vstore_n(dst + i * ldd, row[i], width);
        else vstore(dst + i * ldd, row[i]);
    }
}
/* the same for j < columns <= W where only `rows` of src exist: the others count as 0 */
VINLINE void vtranspose_part(const float *src, Py_ssize_t lds, Py_ssize_t rows, Py_ssize_t columns, float *dst,
                             Py_ssize_t ldd, Py_ssize_t width)
{
    vfloat row[W];
    for (int i = 0; i < W; i++)
        row[i] = i >= rows ? vset1(0.0f) : columns < W ? vload_n(src + i * lds, columns) : vload(src + i * lds);
    vtranspose_rows(row);
    for (int i = 0; i < W && i < columns; i++) {
        if (width < W) vstore_n(dst + i * ldd, row[i], width);
        else vstore(dst + i * ldd, row[i]);
    }
}

#endif
