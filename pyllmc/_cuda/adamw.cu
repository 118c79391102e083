// The optimizer's two passes over memory: the norm of the gradient, and the update.
#include "common.cuh"

namespace pyllmc {
namespace {

// ---- AdamW -----------------------------------------------------------------------------------------------------------

// 32 random bits of the seed and a number: two rounds of multiply and shift on all 64 bits (Steele, Lea & Flood, 2014).
__device__ __forceinline__ uint32_t noise(uint64_t seed, uint64_t i) {
    uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<uint32_t>(z >> 32);
}

// To bfloat16, up with the probability of what is cut off: right on average, where rounding to nearest would lose every
// update smaller than half a unit of the weight's last place. `random` has 16 bits.
__device__ __forceinline__ float round_stochastically(float x, uint32_t random) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return x;  // infinite or NaN
    return __uint_as_float((bits + random) & 0xffff0000u);
}

template <class T, int W>
__device__ __forceinline__ void update(T* param, const T* grad, float* m, float* v, float* master, size_t i,
                                       const AdamW& o) {
    const Floats<W> g = load<W, STREAM>(grad + i);
    Floats<W> mean = load<W, STREAM>(m + i), square = load<W, STREAM>(v + i);
    Floats<W> w = master != nullptr ? load<W, STREAM>(master + i) : load<W>(param + i);
#pragma unroll
    for (int j = 0; j < W; ++j) {
        const float x = g[j] * o.grad_scale;
        mean[j] += o.one_minus_beta1 * (x - mean[j]);
        // not as a difference: where x^2 overflows, v is infinite and the weight rests, instead of inf - inf
        square[j] = o.beta2 * square[j] + o.one_minus_beta2 * (x * x);
        w[j] -= o.step_size * mean[j] / (sqrtf(square[j]) * o.root_scale + o.eps) + o.decay * w[j];
    }
    store<STREAM>(m + i, mean);
    store<STREAM>(v + i, square);
    if (master != nullptr) store<STREAM>(master + i, w);
    if constexpr (sizeof(T) == 2) {
        // One draw serves two neighbours. It belongs to the element, not to the thread: any launch gives the same bits.
        uint32_t random = 0;
#pragma unroll
        for (int j = 0; j < W; ++j) {
            if (j == 0 || (i + j) % 2 == 0) random = noise(o.seed, (i + j) / 2);
            w[j] = round_stochastically(w[j], (i + j) % 2 == 0 ? random & 0xffffu : random >> 16);
        }
    }
    store(param + i, w);
}

template <class T, int W>
__global__ void __launch_bounds__(BLOCK)
update_kernel(T* param, const T* grad, float* m, float* v, float* master, size_t n, AdamW o) {
    const size_t i = (static_cast<size_t>(blockIdx.x) * BLOCK + threadIdx.x) * W;
    if (i + W <= n)
        update<T, W>(param, grad, m, v, master, i, o);
    else
        for (size_t k = i; k < n; ++k) update<T, 1>(param, grad, m, v, master, k, o);
}

// ---- the norm --------------------------------------------------------------------------------------------------------

constexpr int NORM_BLOCKS = 1024;  // whatever the GPU, so that the sums are the same

// partial[block] = the sum of x^2 over the block's share, in double.
template <class T, int W>
__global__ void __launch_bounds__(BLOCK) sum_squares(const T* x, size_t n, double* partial) {
    const size_t stride = static_cast<size_t>(NORM_BLOCKS) * BLOCK * W;
    double sum = 0.0;
    for (size_t i = (static_cast<size_t>(blockIdx.x) * BLOCK + threadIdx.x) * W; i < n; i += stride) {
        if (i + W <= n) {
            const Floats<W> values = load<W, STREAM>(x + i);
#pragma unroll
            for (int j = 0; j < W; ++j) sum += static_cast<double>(values[j]) * values[j];
        } else {
            for (size_t k = i; k < n; ++k) sum += static_cast<double>(to_float(x[k])) * to_float(x[k]);
        }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(BLOCK) root_of_sum(const double* partial, int count, float* out) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += BLOCK) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out = static_cast<float>(sqrt(sum));
}

}  // namespace

void adamw_update(DType type, void* param, const void* grad, float* m, float* v, float* master, size_t n,
                  const AdamW& settings) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const auto run = [&](auto kernel, size_t width) {
            Launch(ceil_div<size_t>(n, BLOCK * width), BLOCK)(kernel, static_cast<T*>(param),
                                                              static_cast<const T*>(grad), m, v, master, n, settings);
        };
        if (vectors_fit<T>(0, param, grad, m, v, master))
            run(update_kernel<T, VECTOR<T>>, VECTOR<T>);
        else
            run(update_kernel<T, 1>, 1);
    });
}

void global_norm(DType type, const void* array, float* out, size_t n) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const auto run = [&](auto kernel, size_t width) {
            const size_t blocks = std::min<size_t>(ceil_div<size_t>(n, BLOCK * width), NORM_BLOCKS);
            const Scratch partial(blocks * sizeof(double));
            Launch(blocks, BLOCK)(kernel, static_cast<const T*>(array), n, partial.as<double>());
            Launch(1, BLOCK)(root_of_sum, partial.as<double>(), blocks, out);
        };
        if (vectors_fit<T>(0, array))
            run(sum_squares<T, VECTOR<T>>, VECTOR<T>);
        else
            run(sum_squares<T, 1>, 1);
    });
}

}  // namespace pyllmc
