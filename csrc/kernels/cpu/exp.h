// e^x for loops that the compiler vectorises.
#pragma once

#include <cmath>
#include <cstdint>

namespace trident {

inline __attribute__((always_inline)) double exp_of(double x) { return std::exp(x); }

// Relative error at most 1e-7 (the polynomial of Cephes); 0 below -87; without branches.
inline __attribute__((always_inline)) float exp_of(float x) {
    float c = x < -87.0f ? -87.0f : x;
    c = c > 88.7f ? 88.7f : c;
    const float n = (c * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to nearest
    const float r = (c - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const float power = __builtin_bit_cast(float, (int32_t(n) + 127) << 23);
    const float e = x < -87.0f ? 0.0f : p * power;
    return x > 88.72283f ? INFINITY : (x != x ? x : e);
}

}  // namespace trident
