// What the CPU kernels of kernels/kernels.h share. Every body is compiled for AVX-512, AVX2 and plain x86-64, and the loader
// picks (CLONES); on other processors once. Loops are written so that gcc vectorises them. Clones cannot be templates:
// each file has one set of plain functions for each type, by a macro.
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
INLINE void put(bf16& to, float x) {  // to nearest, ties to even; NaN stays NaN
    const uint32_t u = __builtin_bit_cast(uint32_t, x), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    to.bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
INLINE void put(f16& to, float x) { to.bits = __builtin_bit_cast(uint16_t, _Float16(x)); }

// x as T keeps it.
template <class T>
INLINE Wide<T> rounded(Wide<T> x) {
    T kept;
    put(kept, x);
    return wide(kept);
}

// f(begin, end) over parts of [0, count), one a thread; tiny work stays on this thread.
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
