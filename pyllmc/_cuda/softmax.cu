// Softmax and cross-entropy, a block for each row of the vocabulary. Padding columns (from V on) take no part. Rows are
// read again from the caches, once for each pass.
#include "common.cuh"

namespace pyllmc {
namespace {

// f(x...): all of the first `n` elements of the rows go through it once, x being as many of each row: W, or 1 at the
// end.
template <int W, class F, class... Rows>
__device__ __forceinline__ void each(size_t n, F f, const Rows*... rows) {
    const size_t done = n / W * W;
    for (size_t j = static_cast<size_t>(threadIdx.x) * W; j < done; j += static_cast<size_t>(blockDim.x) * W)
        f(load<W>(rows + j)...);
    for (size_t j = done + threadIdx.x; j < n; j += blockDim.x) f(load<1>(rows + j)...);
}

// out[j] = f(j, rows[j]...) for the first V elements, 0 for the padding. out may be a row: nobody reads what another
// writes.
template <int W, class T, class F, class... Rows>
__device__ __forceinline__ void map_row(T* out, size_t V, size_t Vp, F f, const Rows*... rows) {
    for (size_t j = static_cast<size_t>(threadIdx.x) * W; j < Vp; j += static_cast<size_t>(blockDim.x) * W) {
        const auto apply = [&](auto... x) {
            Floats<W> y;
#pragma unroll
            for (int k = 0; k < W; ++k) y[k] = j + k < V ? f(j + k, x[k]...) : 0.0f;
            store(out + j, y);
        };
        apply(load<W>(rows + j)...);
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
    each<W>(V, [&](auto some) {
        float largest = some[0];
#pragma unroll
        for (int k = 1; k < some.count; ++k) largest = Max{}(largest, some[k]);
        if (fabsf(largest) < INFINITY) {  // as a rule
            if (largest > top) {
                total *= exp_below(top, largest);  // of the first ones: 0 * e^-inf
                top = largest;
            }
#pragma unroll
            for (int k = 0; k < some.count; ++k) total += exp_below(some[k], top);
            return;
        }
        for (float x : some.v) {
            if (x > top || x != x) {
                total = total * exp_below(top, x) + 1.0f;
                top = x;
            } else {
                total += x == top ? 1.0f : exp_below(x, top);  // infinities, too, are equal
            }
        }
    }, row);
    const float all = block_reduce(top, Max{});
    const float mine = total == 0.0f ? 0.0f : top == all ? total : total * exp_below(top, all);
    return {all, block_sum(mine)};
}

template <class T, int W>
__global__ void __launch_bounds__(MOST_THREADS) softmax_forward_kernel(const T* inp, T* out, size_t V, size_t Vp) {
    const T* row = inp + blockIdx.x * Vp;
    const Statistics of_row = row_statistics<W>(row, V);
    const float factor = 1.0f / of_row.total;
    const auto f = [&](size_t, float x) { return exp_below(x, of_row.top) * factor; };
    map_row<W>(out + blockIdx.x * Vp, V, Vp, f, row);
}

template <class T, int W>
__global__ void __launch_bounds__(MOST_THREADS)
softmax_backward_kernel(const T* dout, const T* out, T* dinp, size_t V, size_t Vp) {
    const T *dy = dout + blockIdx.x * Vp, *y = out + blockIdx.x * Vp;
    float dot = 0.0f;
    each<W>(V, [&](auto p, auto d) {
#pragma unroll
        for (int k = 0; k < p.count; ++k) dot += p[k] * d[k];
    }, y, dy);
    dot = block_sum(dot);
    map_row<W>(dinp + blockIdx.x * Vp, V, Vp, [&](size_t, float p, float d) { return p * (d - dot); }, y, dy);
}

template <class T, int W>
__global__ void __launch_bounds__(MOST_THREADS)
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
__global__ void __launch_bounds__(MOST_THREADS)
crossentropy_backward_kernel(const float* dlosses, const T* logits, const int32_t* targets, const float* lse,
                             T* dlogits, size_t V, size_t Vp) {
    const T* row = logits + blockIdx.x * Vp;
    T* out = dlogits + blockIdx.x * Vp;
    const int32_t target = targets[blockIdx.x];
    const float scale = dlosses[blockIdx.x], log_sum = lse[blockIdx.x];
    const auto f = [&](size_t j, float x) {
        if (target < 0) return 0.0f;
        return (exp_below(x, log_sum) - (j == static_cast<size_t>(target) ? 1.0f : 0.0f)) * scale;
    };
    map_row<W>(out, V, Vp, f, row);
}

// One block adds up all losses.
__global__ void __launch_bounds__(MOST_THREADS)
mean_kernel(const float* losses, const int32_t* targets, float* out, size_t n) {
    double total = 0.0, counted = 0.0;
#pragma unroll 8
    for (size_t i = threadIdx.x; i < n; i += MOST_THREADS) {
        const float loss = losses[i];
        if (targets[i] < 0) continue;
        total += loss;
        counted += 1.0;
    }
    total = block_sum(total);
    counted = block_sum(counted);
    if (threadIdx.x == 0) *out = counted > 0.0 ? static_cast<float>(total / counted) : 0.0f;
}

// run(kernel<T, W>, threads) with the width that fits.
#define RUN_BY_WIDTH(kernel, ...)                              \
    if (vectors_fit<T>(Vp, __VA_ARGS__))                       \
        run(kernel<T, VECTOR<T>>, row_threads(Vp, VECTOR<T>)); \
    else                                                       \
        run(kernel<T, 1>, row_threads(Vp, 1))

}  // namespace

void softmax_forward(DType type, const void* inp, void* out, size_t rows, size_t V, size_t Vp) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const auto run = [&](auto kernel, int threads) {
            Launch(rows, threads)(kernel, static_cast<const T*>(inp), static_cast<T*>(out), V, Vp);
        };
        RUN_BY_WIDTH(softmax_forward_kernel, inp, out);
    });
}

void softmax_backward(DType type, const void* dout, const void* out, void* dinp, size_t rows, size_t V, size_t Vp) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const auto run = [&](auto kernel, int threads) {
            Launch(rows, threads)(kernel, static_cast<const T*>(dout), static_cast<const T*>(out), static_cast<T*>(dinp),
                                  V, Vp);
        };
        RUN_BY_WIDTH(softmax_backward_kernel, dout, out, dinp);
    });
}

void crossentropy_forward(DType type, const void* logits, const int32_t* targets, float* losses, float* lse, size_t rows,
                          size_t V, size_t Vp) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const auto run = [&](auto kernel, int threads) {
            Launch(rows, threads)(kernel, static_cast<const T*>(logits), targets, losses, lse, V, Vp);
        };
        RUN_BY_WIDTH(crossentropy_forward_kernel, logits);
    });
}

void crossentropy_backward(DType type, const float* dlosses, const void* logits, const int32_t* targets,
                           const float* lse, void* dlogits, size_t rows, size_t V, size_t Vp) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const auto run = [&](auto kernel, int threads) {
            Launch(rows, threads)(kernel, dlosses, static_cast<const T*>(logits), targets, lse, static_cast<T*>(dlogits),
                                  V, Vp);
        };
        RUN_BY_WIDTH(crossentropy_backward_kernel, logits, dlogits);
    });
}

void mean_loss(const float* losses, const int32_t* targets, float* out, size_t n) {
    Launch(1, MOST_THREADS)(mean_kernel, losses, targets, out, n);
}

}  // namespace pyllmc
