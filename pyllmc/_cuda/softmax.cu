// Softmax and cross-entropy, a block for each row of the vocabulary. Padding columns (from V on) take no part. Rows are
// read again from the caches, once for each pass.
#include "common.cuh"

namespace pyllmc {
namespace {

// f(x, j): every one of the first `n` elements of a row goes through it once; W at a time where W > 1.
template <int W, class T, class F>
__device__ __forceinline__ void each(const T* row, size_t n, F f) {
    size_t done = 0;
    if constexpr (W > 1) {
        done = n / W * W;
        for (size_t j = static_cast<size_t>(threadIdx.x) * W; j < done; j += static_cast<size_t>(blockDim.x) * W) {
            const Floats<W> x = load<W>(row + j);
#pragma unroll
            for (int k = 0; k < W; ++k) f(x[k], j + k);
        }
    }
    for (size_t j = done + threadIdx.x; j < n; j += blockDim.x) f(to_float(row[j]), j);
}

// out[j] = f(row[j], j) for the first V elements, 0 for the padding. out may be row: nobody reads what another writes.
template <int W, class T, class F>
__device__ __forceinline__ void map_row(const T* row, T* out, size_t V, size_t Vp, F f) {
    for (size_t j = static_cast<size_t>(threadIdx.x) * W; j < Vp; j += static_cast<size_t>(blockDim.x) * W) {
        Floats<W> x = load<W>(row + j);
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] = j + k < V ? f(x[k], j + k) : 0.0f;
        store(out + j, x);
    }
}

struct Statistics {
    float top;    // the largest element; NaN if there is one
    float total;  // the sum of e^(x - top)
};

// In one pass: where a larger element comes up, what was added up so far is scaled down.
template <int W, class T>
__device__ __forceinline__ Statistics row_statistics(const T* row, size_t V) {
    float top = -INFINITY, total = 0.0f;
    each<W>(row, V, [&](float x, size_t) {
        if (x > top || x != x) {
            total = total * expf(top - x) + 1.0f;  // of the first one: 0 * e^-inf
            top = x;
        } else if (x == top) {  // infinities too
            total += 1.0f;
        } else {
            total += expf(x - top);
        }
    });
    const float all = block_reduce(top, Max{});
    const float mine = total == 0.0f ? 0.0f : top == all ? total : total * expf(top - all);
    return {all, block_sum(mine)};
}

template <class T, int W>
__global__ void __launch_bounds__(BLOCK) softmax_forward_kernel(const T* inp, T* out, size_t V, size_t Vp) {
    const T* row = inp + blockIdx.x * Vp;
    const Statistics of_row = row_statistics<W>(row, V);
    const float factor = 1.0f / of_row.total;
    map_row<W>(row, out + blockIdx.x * Vp, V, Vp, [&](float x, size_t) { return expf(x - of_row.top) * factor; });
}

template <class T, int W>
__global__ void __launch_bounds__(BLOCK)
softmax_backward_kernel(const T* dout, const T* out, T* dinp, size_t V, size_t Vp) {
    const T *dy = dout + blockIdx.x * Vp, *y = out + blockIdx.x * Vp;
    float dot = 0.0f;
    each<W>(y, V, [&](float x, size_t j) { dot += x * to_float(dy[j]); });
    dot = block_sum(dot);
    T* dx = dinp + blockIdx.x * Vp;
    map_row<W>(dy, dx, V, Vp, [&](float d, size_t j) { return to_float(y[j]) * (d - dot); });
}

template <class T, int W>
__global__ void __launch_bounds__(BLOCK)
crossentropy_forward_kernel(const T* logits, const int32_t* targets, float* losses, float* lse, size_t V, size_t Vp) {
    const T* row = logits + blockIdx.x * Vp;
    const Statistics of_row = row_statistics<W>(row, V);
    if (threadIdx.x != 0) return;
    const float value = of_row.top + logf(of_row.total);
    const int32_t target = targets[blockIdx.x];
    lse[blockIdx.x] = value;
    losses[blockIdx.x] = target < 0 ? 0.0f : static_cast<size_t>(target) < V ? value - to_float(row[target]) : NAN;
}

template <class T, int W>
__global__ void __launch_bounds__(BLOCK)
crossentropy_backward_kernel(const float* dlosses, const T* logits, const int32_t* targets, const float* lse,
                             T* dlogits, size_t V, size_t Vp) {
    const T* row = logits + blockIdx.x * Vp;
    T* out = dlogits + blockIdx.x * Vp;
    const int32_t target = targets[blockIdx.x];
    const float scale = dlosses[blockIdx.x], log_sum = lse[blockIdx.x];
    map_row<W>(row, out, V, Vp, [&](float x, size_t j) {
        if (target < 0) return 0.0f;
        return (expf(x - log_sum) - (j == static_cast<size_t>(target) ? 1.0f : 0.0f)) * scale;
    });
}

constexpr int MEAN = 1024;  // threads of the one block that adds up all losses

__global__ void __launch_bounds__(MEAN)
mean_kernel(const float* losses, const int32_t* targets, float* out, size_t n) {
    double total = 0.0, counted = 0.0;
#pragma unroll 8
    for (size_t i = threadIdx.x; i < n; i += MEAN) {
        const float loss = losses[i];
        if (targets[i] < 0) continue;
        total += loss;
        counted += 1.0;
    }
    total = block_sum(total);
    counted = block_sum(counted);
    if (threadIdx.x == 0) *out = counted > 0.0 ? static_cast<float>(total / counted) : 0.0f;
}

// run(kernel<T, W>) with the width that fits.
#define RUN_BY_WIDTH(kernel, ...)                         \
    if (vectors_fit<T>(Vp, __VA_ARGS__))                  \
        run(kernel<T, VECTOR<T>>);                        \
    else                                                  \
        run(kernel<T, 1>)

}  // namespace

void softmax_forward(DType type, const void* inp, void* out, size_t rows, size_t V, size_t Vp) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const auto run = [&](auto kernel) {
            Launch(rows, BLOCK)(kernel, static_cast<const T*>(inp), static_cast<T*>(out), V, Vp);
        };
        RUN_BY_WIDTH(softmax_forward_kernel, inp, out);
    });
}

void softmax_backward(DType type, const void* dout, const void* out, void* dinp, size_t rows, size_t V, size_t Vp) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const auto run = [&](auto kernel) {
            Launch(rows, BLOCK)(kernel, static_cast<const T*>(dout), static_cast<const T*>(out), static_cast<T*>(dinp), V,
                                Vp);
        };
        RUN_BY_WIDTH(softmax_backward_kernel, dout, out, dinp);
    });
}

void crossentropy_forward(DType type, const void* logits, const int32_t* targets, float* losses, float* lse, size_t rows,
                          size_t V, size_t Vp) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const auto run = [&](auto kernel) {
            Launch(rows, BLOCK)(kernel, static_cast<const T*>(logits), targets, losses, lse, V, Vp);
        };
        RUN_BY_WIDTH(crossentropy_forward_kernel, logits);
    });
}

void crossentropy_backward(DType type, const float* dlosses, const void* logits, const int32_t* targets,
                           const float* lse, void* dlogits, size_t rows, size_t V, size_t Vp) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const auto run = [&](auto kernel) {
            Launch(rows, BLOCK)(kernel, dlosses, static_cast<const T*>(logits), targets, lse, static_cast<T*>(dlogits), V,
                                Vp);
        };
        RUN_BY_WIDTH(crossentropy_backward_kernel, logits, dlogits);
    });
}

void mean_loss(const float* losses, const int32_t* targets, float* out, size_t n) {
    Launch(1, MEAN)(mean_kernel, losses, targets, out, n);
}

}  // namespace pyllmc
