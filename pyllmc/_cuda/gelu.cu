// GELU in its tanh form, as GPT-2 has it, and the residual sum, both ways: one pass over memory each. With
// u = sqrt(2/pi) (x + 0.044715 x^3), gelu(x) = x s with s = 1 / (1 + e^(-2u)): one exponential and no tanh, and large
// negative x keep their relative precision.
#include "gelu.cuh"

namespace pyllmc {
namespace {

struct Gelu {
    __device__ __forceinline__ float operator()(float x) const { return gelu(x); }
};

struct GeluBackward {
    __device__ __forceinline__ float operator()(float dout, float x) const { return dout * gelu_slope(x); }
};

struct Add {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// out[i] = f(inputs[i]...). W elements to a thread; the last block handles what does not fill a vector one by one.
template <class T, int W, class F, class... Inputs>
__global__ void __launch_bounds__(BLOCK) map_kernel(F f, size_t n, T* out, const Inputs*... inputs) {
    const size_t i = (static_cast<size_t>(blockIdx.x) * BLOCK + threadIdx.x) * W;
    if (i + W <= n) {
        const auto apply = [&](auto... x) {
            Floats<W> y;
#pragma unroll
            for (int j = 0; j < W; ++j) y[j] = f(x[j]...);
            store(out + i, y);
        };
        apply(load<W, STREAM>(inputs + i)...);
    } else {
        for (size_t k = i; k < n; ++k) out[k] = from_float<T>(f(to_float(inputs[k])...));
    }
}

// Read once for both.
template <class T, int W>
__global__ void __launch_bounds__(BLOCK) copy_kernel(const T* from, T* first, T* second, size_t n) {
    const size_t i = (static_cast<size_t>(blockIdx.x) * BLOCK + threadIdx.x) * W;
    if (i + W <= n) {
        const Floats<W> x = load<W, STREAM>(from + i);
        store(first + i, x);
        store(second + i, x);
    } else {
        for (size_t k = i; k < n; ++k) first[k] = second[k] = from[k];
    }
}

template <class T, int W, class F, class... Inputs>
void launch_map(F f, size_t n, T* out, const Inputs*... inputs) {
    Launch(ceil_div<size_t>(n, BLOCK * W), BLOCK)(map_kernel<T, W, F, Inputs...>, f, n, out, inputs...);
}

template <class F, class... Inputs>
void map(DType type, F f, size_t n, void* out, Inputs... inputs) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        if (vectors_fit<T>(0, static_cast<const void*>(out), inputs...))
            launch_map<T, VECTOR<T>>(f, n, static_cast<T*>(out), static_cast<const T*>(inputs)...);
        else
            launch_map<T, 1>(f, n, static_cast<T*>(out), static_cast<const T*>(inputs)...);
    });
}

}  // namespace

void gelu_forward(DType type, const void* inp, void* out, size_t n) { map(type, Gelu{}, n, out, inp); }

void gelu_backward(DType type, const void* dout, const void* inp, void* dinp, size_t n) {
    map(type, GeluBackward{}, n, dinp, dout, inp);
}

void residual_forward(DType type, const void* inp1, const void* inp2, void* out, size_t n) {
    map(type, Add{}, n, out, inp1, inp2);
}

void residual_backward(DType type, const void* dout, void* dinp1, void* dinp2, size_t n) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const T* const from = static_cast<const T*>(dout);
        T *first = static_cast<T*>(dinp1), *second = static_cast<T*>(dinp2);
        if (first == from || second == from) return copy(first == from ? second : first, from, n * sizeof(T));
        const bool vectors = vectors_fit<T>(0, from, first, second);
        const size_t width = vectors ? VECTOR<T> : 1;
        Launch(ceil_div<size_t>(n, BLOCK * width), BLOCK)(vectors ? copy_kernel<T, VECTOR<T>> : copy_kernel<T, 1>, from,
                                                          first, second, n);
    });
}

}  // namespace pyllmc
