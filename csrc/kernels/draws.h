// Keyed draws, for the CPU and CUDA kernels: Philox4x32-10 (Salmon et al. 2011) and what its words become.
//
// The same bits everywhere: integers, and float32 operations that IEEE 754 rounds exactly (+ - * sqrt, conversions).
// A compiler must not contract a product and a sum to an FMA: CUDA code uses intrinsics that are never contracted, and
// the file of the CPU kernels forbids it by a pragma. Nothing here may use a function of libm but sqrt.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/kernels.h"

#ifdef __CUDACC__
#define EXACT __host__ __device__ __forceinline__
#else
#define EXACT inline __attribute__((always_inline))
#endif

namespace trident::draws {

constexpr int LANES = 16, WORDS = 4, GROUP = LANES * WORDS;

#ifdef __CUDA_ARCH__
EXACT float mul(float a, float b) { return __fmul_rn(a, b); }
EXACT float add(float a, float b) { return __fadd_rn(a, b); }
EXACT float root(float x) { return __fsqrt_rn(x); }
EXACT float as_float(uint32_t x) { return __uint_as_float(x); }
EXACT uint32_t as_bits(float x) { return __float_as_uint(x); }
#else
EXACT float mul(float a, float b) { return a * b; }
EXACT float add(float a, float b) { return a + b; }
EXACT float root(float x) { return std::sqrt(x); }
EXACT float as_float(uint32_t x) { return __builtin_bit_cast(float, x); }
EXACT uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
#endif

// The four words of a counter. Element i of a canonical tensor takes word i / 16 % 4 of counter i / 64 * 16 + i % 16, so
// that 16 counters side by side give 64 elements in order.
EXACT void philox(const DrawKey& key, uint64_t counter, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    uint32_t k0 = uint32_t(key.key), k1 = uint32_t(key.key >> 32);
    a = uint32_t(counter), b = uint32_t(counter >> 32), c = uint32_t(key.stream), d = uint32_t(key.stream >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int round = 0; round < 10; round++) {
        const uint64_t p = uint64_t(0xD2511F53u) * a, q = uint64_t(0xCD9E8D57u) * c;
        a = uint32_t(q >> 32) ^ b ^ k0;
        b = uint32_t(q);
        c = uint32_t(p >> 32) ^ d ^ k1;
        d = uint32_t(p);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

template <int N>
EXACT float polynomial(const float (&c)[N], float x) {
    float sum = c[N - 1];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int i = N - 2; i >= 0; i--) sum = add(mul(sum, x), c[i]);
    return sum;
}

// Uniform in [0, 1): a multiple of 2^-24.
EXACT float uniform(uint32_t word) { return mul(float(int32_t(word >> 8)), 0x1p-24f); }

// The standard normal quantile of (word + 1/2) / 2^32 (word as a signed number: symmetric about 0), relative error below
// 4e-7, at most 6.34. With a tail of probability t on each side, w = -log(4 t (1 - t)), z = (1 - 2 t) P(w), where P is a
// polynomial of w in the middle and of sqrt(w) in the tails (Giles 2010; coefficients fitted to 32-bit words).
EXACT float normal(uint32_t word) {
    constexpr float LOG[] = {0.9999999403953552f, -0.5000036358833313f,  0.33335059881210327f, -0.24969908595085144f,
                             0.1990017294883728f, -0.17250847816467285f, 0.16222524642944336f, -0.10106763988733292f};
    constexpr float MIDDLE[] = {2.1233136653900146f,     0.3488026559352875f,    -0.005908171180635691f,
                                -0.0017730101244524121f, 0.0003091501712333411f, -6.217987902346067e-06f,
                                -4.990560228179675e-06f, 4.861034881287196e-07f, 4.0354226626959644e-08f};
    constexpr float TAIL[] = {4.7170891761779785f,     1.4246379137039185f,     0.004640835803002119f,
                              -0.0029539959505200386f, 0.0015044164611026645f,  -0.0008490706677548587f,
                              0.0007000468904152513f,  -0.0004569130251184106f, 3.346082303323783e-05f,
                              6.402532017091289e-05f};
    constexpr float LOG2 = 0.693147182464599609375f, CUT = 5.0f;
    const uint32_t sign = word >> 31, half = word ^ (0u - sign);  // half: distance from the middle, below 2^31
    const float t = mul(add(float(int32_t(0x7fffffffu - half)), 0.5f), 0x1p-32f);
    const float x = mul(add(float(int32_t(half)), 0.5f), 0x1p-31f);
    const uint32_t bits = as_bits(mul(t, add(4.0f, mul(-4.0f, t)))) - 0x3f3504f3u;  // of the mantissa above sqrt(1/2)
    const float f = add(as_float((bits & 0x7fffffu) + 0x3f3504f3u), -1.0f);
    const float w = -add(mul(float(int32_t(bits) >> 23), LOG2), mul(f, polynomial(LOG, f)));
    const float middle = polynomial(MIDDLE, add(w, -2.5f));
    const float tail = polynomial(TAIL, add(root(w > CUT ? w : CUT), -3.5f));
    const float z = mul(x, w < CUT ? middle : tail);
    return as_float(as_bits(z) | sign << 31);
}

}  // namespace trident::draws
