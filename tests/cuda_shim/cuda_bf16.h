// bfloat16 as CUDA's header names it: the upper half of a float, rounded to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    __nv_bfloat16 x;
    if ((wide & 0x7fffffffu) > 0x7f800000u)
        x.bits = 0x7fff;  // as the device does: one NaN for all
    else
        x.bits = static_cast<uint16_t>((wide + 0x7fffu + (wide >> 16 & 1u)) >> 16);
    return x;
}

inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }

inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) {
    __nv_bfloat16 x;
    x.bits = bits;
    return x;
}
