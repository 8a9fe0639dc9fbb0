// GEMM and attention with AVX-512.

#include "kernels/cpu/tiles.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#define TILES avx512
#define WITH_AVX512 1
#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/gemm_tiles.h"

const trident::Tiles* trident::avx512_tiles() {
    static constexpr Tiles tiles{"AVX-512", avx512::sgemm, avx512::attention, avx512::attention_backward};
    const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("fma");
    return runs ? &tiles : nullptr;
}

#else

const trident::Tiles* trident::avx512_tiles() { return nullptr; }

#endif
