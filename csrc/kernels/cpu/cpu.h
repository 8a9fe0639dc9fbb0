// Shared by the CPU kernels of kernels/kernels.h. Every function marked CLONES is compiled for AVX-512, AVX2 and
// baseline x86-64, and the loader selects one; on other processors it is compiled once. Loops are written so that gcc
// vectorises them. Clones cannot be templates, so each file defines plain functions for each type.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(NO_CLONES)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

namespace trident {

INLINE float wide(float x) { return x; }
INLINE double wide(double x) { return x; }
INLINE float wide(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
INLINE float wide(f16 x) { return float(__builtin_bit_cast(_Float16, x.bits)); }

INLINE void put(float& to, float x) { to = x; }
INLINE void put(double& to, double x) { to = x; }
INLINE void put(bf16& to, float x) {  // round to nearest, ties to even; NaN stays NaN
    const uint32_t u = __builtin_bit_cast(uint32_t, x), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    to.bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
INLINE void put(f16& to, float x) { to.bits = __builtin_bit_cast(uint16_t, _Float16(x)); }

// x rounded to T.
template <class T>
INLINE Wide<T> rounded(Wide<T> x) {
    T narrow;
    put(narrow, x);
    return wide(narrow);
}

// f(begin, end) over parts of [0, count), one per thread; small work stays on the calling thread.
template <class F>
void split(int64_t count, int64_t work, int threads, F f) {
    const int64_t parts = work < (1 << 15) ? 1 : std::min<int64_t>(threads, count);
    if (parts <= 1) {
        if (count > 0) f(int64_t(0), count);
        return;
    }
#pragma omp parallel for num_threads(int(parts)) schedule(static, 1)
    for (int64_t p = 0; p < parts; p++) f(count * p / parts, count * (p + 1) / parts);
}

}  // namespace trident
