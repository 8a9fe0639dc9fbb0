// The words of keyed draws at consecutive places, for the CPU kernels.
#pragma once

#include "kernels/cpu/cpu.h"
#include "kernels/draws.h"

#define INLINE_CALL __attribute__((always_inline))

namespace trident::draws {

// Calls f(words, i, count) for parts of [0, n): words[j] is the word of place + i + j.
template <class F>
INLINE void over_words(const DrawKey& key, uint64_t place, int64_t n, F f) {
    constexpr int64_t GROUPS = 16;
    alignas(64) uint32_t words[GROUPS * GROUP];
    for (int64_t i = 0; i < n;) {
        const uint64_t group = (place + uint64_t(i)) / GROUP;
        const int64_t skip = int64_t((place + uint64_t(i)) % GROUP);
        const int64_t count = std::min<int64_t>(GROUPS * GROUP - skip, n - i);
        for (int64_t g = 0; g * GROUP < skip + count; g++) {
            uint32_t* at = words + g * GROUP;
#pragma omp simd
            for (int l = 0; l < LANES; l++)
                draws::philox(key, (group + uint64_t(g)) * LANES + uint64_t(l), at[l], at[LANES + l], at[2 * LANES + l],
                              at[3 * LANES + l]);
        }
        f(words + skip, i, count);
        i += count;
    }
}

}  // namespace trident::draws
