// GELU and its slope on one number, for every kernel that has them; see gelu.cu for the formula.
#pragma once

#include "common.cuh"

namespace pyllmc {

// -2u log2(e) = x (A + B x^2): A = -2 sqrt(2/pi) log2(e), B = 0.044715 A.
__device__ __forceinline__ float gelu_exponent(float x) {
    return x * (x * x * -0.10294324f + -2.3022082f);
}

__device__ __forceinline__ float gelu(float x) { return __fdividef(x, 1.0f + exp2_fast(gelu_exponent(x))); }

// s + x s (1 - s) 2u', 2u' = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2), and 1 - s = e s with e = e^(-2u).
__device__ __forceinline__ float gelu_slope(float x) {
    // beyond |x| = 11 the slope is 0 or 1 to the last bit, and beyond e = 2^115 it is 0: the bounds keep infinities out
    const float bounded = x < -11.0f ? -11.0f : x > 11.0f ? 11.0f : x;  // a NaN stays
    const float exponent = gelu_exponent(bounded);
    const float e = exp2_fast(exponent > 115.0f ? 115.0f : exponent);
    const float s = __fdividef(1.0f, 1.0f + e);
    return bounded * s * (e * s) * (bounded * bounded * 0.21406445f + 1.5957691f) + s;
}

}  // namespace pyllmc
