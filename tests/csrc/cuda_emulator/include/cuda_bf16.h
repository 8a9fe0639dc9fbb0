// See cuda_runtime.h: rounding to bfloat16, to nearest, ties to even, as the hardware does it (NaN becomes 0x7fff).
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
    uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    return {std::isnan(x) ? uint16_t(0x7fff) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
