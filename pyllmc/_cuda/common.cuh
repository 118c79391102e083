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
constexpr int BLOCK = 256;  // threads of an elementwise kernel

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

// ---- vectors: W elements, moved 16 bytes at a time -------------------------------------------------------------------

// Elements of T in 16 bytes. Kernels are templates of <T, W> with W = VECTOR<T> or, where an address or a row length
// does not allow that, W = 1.
template <class T>
constexpr int VECTOR = 16 / static_cast<int>(sizeof(T));

template <int W>
struct Floats {
    float v[W];
    __device__ __forceinline__ float& operator[](int i) { return v[i]; }
    __device__ __forceinline__ float operator[](int i) const { return v[i]; }
};

// How a value is moved: KEEP it in the caches for a reader to come, or STREAM past them; what is stored may go to a TILE in
// shared memory.
enum Hint { KEEP, STREAM, TILE };

// 16 bytes as they lie in memory, for what is loaded early and used late: bfloat16 takes half the registers of float.
template <class T>
struct Raw {
    uint32_t word[4];
    __device__ __forceinline__ float operator[](int i) const {
        if constexpr (sizeof(T) == 4) return __uint_as_float(word[i]);
        return __uint_as_float(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xffff0000u);
    }
};

template <Hint hint = KEEP, class T>
__device__ __forceinline__ Raw<T> load_raw(const T* p) {
    const uint4* at = reinterpret_cast<const uint4*>(p);
    const uint4 x = hint == STREAM ? __ldcs(at) : *at;
    return {{x.x, x.y, x.z, x.w}};
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

template <int W, Hint hint = KEEP, class T>
__device__ __forceinline__ Floats<W> load(const T* p) {
    Floats<W> x;
    if constexpr (W % VECTOR<T> == 0) {
#pragma unroll
        for (int i = 0; i < W; i += VECTOR<T>) {
            const Raw<T> raw = load_raw<hint>(p + i);
#pragma unroll
            for (int j = 0; j < VECTOR<T>; ++j) x[i + j] = raw[j];
        }
    } else {
#pragma unroll
        for (int i = 0; i < W; ++i) x[i] = to_float(p[i]);
    }
    return x;
}

template <Hint hint = KEEP, int W, class T>
__device__ __forceinline__ void store(T* p, const Floats<W>& x) {
    if constexpr (W % VECTOR<T> == 0) {
#pragma unroll
        for (int i = 0; i < W; i += VECTOR<T>) {
            uint32_t word[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if constexpr (sizeof(T) == 4)
                    word[j] = __float_as_uint(x[i + j]);
                else
                    word[j] = pack_bf16(x[i + 2 * j], x[i + 2 * j + 1]);
            }
            uint4* at = reinterpret_cast<uint4*>(p + i);
            const uint4 all{word[0], word[1], word[2], word[3]};
            if (hint == STREAM)
                __stcs(at, all);
            else if (hint == KEEP)
                __stwb(at, all);  // of *at = all, nvcc makes four stores of 4 bytes in some kernels
            else
                *at = all;
        }
    } else {
#pragma unroll
        for (int i = 0; i < W; ++i) p[i] = from_float<T>(x[i]);
    }
}

// ---- reductions: in a fixed order, every lane gets the same bits -----------------------------------------------------

struct Sum {
    template <class A>
    __device__ __forceinline__ A operator()(A a, A b) const { return a + b; }
};

struct Max {  // of a NaN and a number: the NaN
    __device__ __forceinline__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
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
    x = partial[0];
    for (int i = 1; i < warps; ++i) x = op(x, partial[i]);
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

// Whether vectors of 16 bytes may be used: every address and the row length (in elements of T) are multiples of them.
template <class T, class... P>
bool vectors_fit(size_t row, const P*... pointers) {
    return row % VECTOR<T> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace pyllmc
