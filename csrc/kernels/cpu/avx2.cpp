// GEMM and attention with AVX2.

#include "kernels/cpu/tiles.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#define TILES avx2
#define WITH_AVX512 0
#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/gemm_tiles.h"

const trident::Tiles* trident::avx2_tiles() {
    static constexpr Tiles tiles{"AVX2", avx2::sgemm, avx2::attention, avx2::attention_backward};
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &tiles : nullptr;
}

#else

const trident::Tiles* trident::avx2_tiles() { return nullptr; }

#endif
