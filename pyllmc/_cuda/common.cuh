// What kernels share: element types, vectors of 16 bytes, sums over a warp and a block, the choice of a kernel by type.
// Every .cu file includes this. The same files compile as plain C++ for machines without a GPU (README.md).
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>

#include "runtime.h"

// Shared memory is declared through these two, so that the build without a GPU can poison it before each block:
// SHARED(float, partial, [32]);  DYNAMIC_SHARED(float, tile);
#ifdef __CUDACC__
#define SHARED(type, name, dimensions) __shared__ __align__(16) type name dimensions
#define DYNAMIC_SHARED(type, name)                                  \
    extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared)
#else
#define SHARED(type, name, dimensions) auto& name = shim::shared_array<type dimensions>([] {})
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(shim::dynamic_shared())
#endif

namespace pyllmc {

using bf16 = __nv_bfloat16;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int BLOCK = 256;          // threads of an elementwise kernel
constexpr int MOST_THREADS = 1024;  // that a block may have
constexpr float LOG2_E = 1.4426950408889634f;

template <class T>
__host__ __device__ constexpr T ceil_div(T n, T d) {
    return (n + d - 1) / d;
}

// ---- elements: arithmetic is float, memory is T ----------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// 2^x with a relative error of 2^-22; 0 below -126, infinity above 128.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return std::exp2(x);
#endif
}

// e^(x - top), 1 where they are equal.
__device__ __forceinline__ float exp_below(float x, float top) { return exp2_fast((x - top) * LOG2_E); }

// ---- vectors: W elements, moved 16 bytes at a time -------------------------------------------------------------------

// Elements of T in 16 bytes. Kernels are templates of <T, W> with W = VECTOR<T> or, where an address or a row length
// does not allow that, W = 1.
template <class T>
constexpr int VECTOR = 16 / static_cast<int>(sizeof(T));

template <int W>
struct Floats {
    static constexpr int count = W;
    float v[W];
    __device__ __forceinline__ float& operator[](int i) { return v[i]; }
    __device__ __forceinline__ float operator[](int i) const { return v[i]; }
};

// How a value is moved: KEEP it in the caches for a reader to come, or STREAM past them; what is stored may go to a
// TILE in shared memory.
enum Hint { KEEP, STREAM, TILE };

// 16 bytes, or 8, as they lie in memory, for what is loaded early and used late: bfloat16 takes half the registers of
// float.
template <class T, int BYTES = 16>
struct Raw {
    uint32_t word[BYTES / 4];
    __device__ __forceinline__ float operator[](int i) const {
        if constexpr (sizeof(T) == 4) return __uint_as_float(word[i]);
        return __uint_as_float(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xffff0000u);
    }
};

template <Hint hint = KEEP, int BYTES = 16, class T>
__device__ __forceinline__ Raw<T, BYTES> load_raw(const T* p) {
    if constexpr (BYTES == 16) {
        const uint4* at = reinterpret_cast<const uint4*>(p);
        const uint4 x = hint == STREAM ? __ldcs(at) : *at;
        return {{x.x, x.y, x.z, x.w}};
    } else {
        const uint2* at = reinterpret_cast<const uint2*>(p);
        const uint2 x = hint == STREAM ? __ldcs(at) : *at;
        return {{x.x, x.y}};
    }
}

// Two neighbours in one word: bfloat16, the first in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float first, float second) {
#ifdef __CUDACC__
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(both);
#else
    return __bfloat16_as_ushort(__float2bfloat16_rn(first)) |
           static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(second))) << 16;
#endif
}

// How many bytes are moved at a time: 16, 8 where bfloat16 goes with as many floats, or those of one element.
template <class T, int W>
constexpr int STEP_BYTES = W % VECTOR<T> == 0 ? 16 : W * sizeof(T) == 8 ? 8 : sizeof(T);

template <int W, Hint hint = KEEP, class T>
__device__ __forceinline__ Floats<W> load(const T* p) {
    constexpr int BYTES = STEP_BYTES<T, W>, STEP = BYTES / sizeof(T);
    Floats<W> x;
#pragma unroll
    for (int i = 0; i < W; i += STEP) {
        if constexpr (STEP > 1) {
            const auto raw = load_raw<hint, BYTES>(p + i);
#pragma unroll
            for (int j = 0; j < STEP; ++j) x[i + j] = raw[j];
        } else {
            x[i] = to_float(p[i]);
        }
    }
    return x;
}

template <Hint hint, class V>
__device__ __forceinline__ void store_words(V* at, const V& all) {
    if (hint == STREAM)
        __stcs(at, all);
    else if (hint == KEEP)
        __stwb(at, all);  // of *at = all, nvcc makes stores of 4 bytes in some kernels
    else
        *at = all;
}

template <Hint hint = KEEP, class T, int BYTES>
__device__ __forceinline__ void store(T* p, const Raw<T, BYTES>& x) {
    if constexpr (BYTES == 16)
        store_words<hint>(reinterpret_cast<uint4*>(p), uint4{x.word[0], x.word[1], x.word[2], x.word[3]});
    else
        store_words<hint>(reinterpret_cast<uint2*>(p), uint2{x.word[0], x.word[1]});
}

template <Hint hint = KEEP, int W, class T>
__device__ __forceinline__ void store(T* p, const Floats<W>& x) {
    constexpr int BYTES = STEP_BYTES<T, W>, STEP = BYTES / sizeof(T);
#pragma unroll
    for (int i = 0; i < W; i += STEP) {
        if constexpr (STEP > 1) {
            Raw<T, BYTES> raw;
#pragma unroll
            for (int j = 0; j < BYTES / 4; ++j) {
                if constexpr (sizeof(T) == 4)
                    raw.word[j] = __float_as_uint(x[i + j]);
                else
                    raw.word[j] = pack_bf16(x[i + 2 * j], x[i + 2 * j + 1]);
            }
            store<hint>(p + i, raw);
        } else {
            p[i] = from_float<T>(x[i]);
        }
    }
}

// ---- reductions: in a fixed order, every lane gets the same bits -----------------------------------------------------

// What is reduced, and what changes nothing in it.
struct Sum {
    template <class A>
    __device__ __forceinline__ A operator()(A a, A b) const { return a + b; }
    template <class A>
    __device__ __forceinline__ static A nothing() { return 0; }
};

struct Max {  // of a NaN and a number: the NaN
    __device__ __forceinline__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
    template <class A>
    __device__ __forceinline__ static A nothing() { return -INFINITY; }
};

template <class Op, class A>
__device__ __forceinline__ A warp_reduce(A x, Op op) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
    return warp_reduce(x, Sum{});
}

// Over all threads of a block, whose number is a multiple of 32; every thread calls it and gets the result. Calls may
// follow each other at once: the barrier at the end keeps the next one from overwriting what is still being read.
template <class Op, class A>
__device__ __forceinline__ A block_reduce(A x, Op op) {
    SHARED(A, partial, [WARP]);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_reduce(x, op);
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    x = warp_reduce(lane < warps ? partial[lane] : Op::template nothing<A>(), op);  // each warp for itself
    __syncthreads();
    return x;
}

template <class A>
__device__ __forceinline__ A block_sum(A x) {
    return block_reduce(x, Sum{});
}

// ---- on the host: which kernel ---------------------------------------------------------------------------------------

// Calls f with a value of the element type: by_type(type, [&](auto zero) { using T = decltype(zero); ... }).
template <class F>
void by_type(DType type, F f) {
    if (type == BFLOAT16)
        f(bf16{});
    else
        f(float{});
}

// Threads of a block that goes through a row of n elements, W at a time.
inline int row_threads(size_t n, int W) {
    return static_cast<int>(std::min<size_t>(ceil_div<size_t>(n, static_cast<size_t>(W) * WARP) * WARP, MOST_THREADS));
}

// Whether vectors of 16 bytes may be used: every address and the row length (in elements of T) are multiples of them.
template <class T, class... P>
bool vectors_fit(size_t row, const P*... pointers) {
    return row % VECTOR<T> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace pyllmc
