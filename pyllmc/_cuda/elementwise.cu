// Small kernels that several ops share: conversion between types, scaling, the second stage of sums over rows.
#include "common.cuh"

namespace pyllmc {
namespace {

template <class To, class From>
__global__ void cast_kernel(To* to, const From* from, size_t n) {
    const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
    for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride)
        to[i] = from_float<To>(to_float(from[i]));
}

template <class T>
__global__ void scale_kernel(T* data, float factor, size_t n) {
    const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
    for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride)
        data[i] = from_float<T>(to_float(data[i]) * factor);
}

constexpr int SHARES = 32;  // threads of one column: each adds every 32nd chunk

template <class T>
__global__ void __launch_bounds__(WARP* SHARES)
add_partials_kernel(const float* partial, size_t stride, int chunks, size_t columns, T* out, bool accumulate,
                    T* second) {
    SHARED(float, sums, [SHARES][WARP]);
    const int column = threadIdx.x % WARP, share = threadIdx.x / WARP;
    const size_t j = static_cast<size_t>(blockIdx.x) * WARP + column;
    if (blockIdx.y == 1) {
        partial += columns;
        out = second;
    }
    float sum = 0.0f;
    if (j < columns) {
#pragma unroll 4
        for (int chunk = share; chunk < chunks; chunk += SHARES) sum += partial[chunk * stride + j];
    }
    sums[share][column] = sum;
    __syncthreads();
    if (share != 0 || j >= columns) return;
    for (int i = 1; i < SHARES; ++i) sum += sums[i][column];
    if (accumulate) sum += to_float(out[j]);
    out[j] = from_float<T>(sum);
}

constexpr size_t MAX_BLOCKS = 4096;

Launch over(size_t n) { return Launch(std::min(ceil_div<size_t>(n, BLOCK), MAX_BLOCKS), BLOCK); }

}  // namespace

void cast(DType to_type, void* to, DType from_type, const void* from, size_t n) {
    if (n == 0) return;
    by_type(to_type, [&](auto to_zero) {
        using To = decltype(to_zero);
        by_type(from_type, [&](auto from_zero) {
            using From = decltype(from_zero);
            over(n)(cast_kernel<To, From>, static_cast<To*>(to), static_cast<const From*>(from), n);
        });
    });
}

void add_partials(DType type, const float* partial, size_t stride, size_t chunks, size_t columns, void* out,
                  bool accumulate, void* second) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const dim3 blocks(ceil_div<size_t>(columns, WARP), second != nullptr ? 2 : 1);
        Launch(blocks, WARP * SHARES)(add_partials_kernel<T>, partial, stride, chunks, columns, static_cast<T*>(out),
                                      accumulate, static_cast<T*>(second));
    });
}

void scale(DType type, void* data, float factor, size_t n) {
    if (n == 0) return;
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        over(n)(scale_kernel<T>, static_cast<T*>(data), factor, n);
    });
}

}  // namespace pyllmc
