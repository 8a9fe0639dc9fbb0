// The building blocks of GEMM: a tile of C in registers, and the packing of operands. For gemm_tiles.h and
// attention_tiles.h, which avx512.cpp and avx2.cpp compile into a namespace of their name (TILES).
//
// With AVX-512 a tile is 14 x 32: 28 accumulators, two vectors of B, one broadcast of A. With AVX2 it is 6 x 16: 12 of
// the 16 registers. The terms of each element are added in the order of k, so the result does not depend on the
// element's place in its tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include <immintrin.h>

#include "kernels/cpu/tiles.h"

namespace trident::TILES {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

inline Buffer allocate(int64_t count) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, size_t(count) * sizeof(float)) != 0) throw std::bad_alloc();
    return Buffer(static_cast<float*>(p));
}

#if WITH_AVX512
constexpr int64_t V = 16, MR = 14;  // floats of a vector; rows of a tile
#define TILE_TARGET_BEGIN \
    _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512vl,avx512dq,avx512bw,fma,avx2\")")
#else
constexpr int64_t V = 8, MR = 6;
#define TILE_TARGET_BEGIN _Pragma("GCC push_options") _Pragma("GCC target(\"fma,avx2\")")
#endif
#define TILE_TARGET_END _Pragma("GCC pop_options")
constexpr int64_t NR = 2 * V;

TILE_TARGET_BEGIN

typedef float Vector __attribute__((vector_size(4 * V), aligned(4 * V)));
typedef float Anywhere __attribute__((vector_size(4 * V), aligned(4)));

// dst[p * width + i] = src[i * line + p] for V values of p and `count` <= V values of i. Writes V values at each p; the
// surplus ones are overwritten by the next p (or the next panel), so dst needs space for two more values at its end.
#if WITH_AVX512
inline __attribute__((always_inline)) void transpose(const float* src, int64_t line, int64_t count, float* dst,
                                                     int64_t width) {
    __m512 r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(src + (i < count ? i : 0) * line);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            r[i + 2 * j + 1] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {  // r[4 q + i]: columns i, i + 4, i + 8, i + 12 of rows 4 q .. 4 q + 3
        const __m512 a = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88),
                     b = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
        const __m512 c = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd),
                     d = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
        t[i] = _mm512_shuffle_f32x4(a, b, 0x88);
        t[i + 8] = _mm512_shuffle_f32x4(a, b, 0xdd);
        t[i + 4] = _mm512_shuffle_f32x4(c, d, 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) _mm512_storeu_ps(dst + i * width, t[i]);
}
#else
inline __attribute__((always_inline)) void transpose(const float* src, int64_t line, int64_t count, float* dst,
                                                     int64_t width) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(src + (i < count ? i : 0) * line);
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {  // r[4 q + i]: columns i, i + 4 of rows 4 q .. 4 q + 3
        t[i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x31);
    }
    for (int i = 0; i < 8; i++) _mm256_storeu_ps(dst + i * width, t[i]);
}
#endif

// Panels of W lines (rows of A, columns of B): dst[panel][k][W]. line: stride between lines, step: along k.
template <int64_t W>
inline void pack(const float* src, int64_t line, int64_t step, int64_t lines, int64_t k, float* dst) {
    if (line == 1) {  // adjacent lines are contiguous: copy runs, several panels at a time to stay within a page
        constexpr int64_t GROUP = 8 * W;
        for (int64_t l0 = 0; l0 < lines; l0 += GROUP) {
            int64_t group = std::min(GROUP, lines - l0);
            for (int64_t p = 0; p < k; p++) {
                const float* from = src + p * step + l0;
                for (int64_t l = 0; l < group; l += W) {
                    float* to = dst + (l0 + l) * k + p * W;
                    if (group - l >= W) {
                        std::memcpy(to, from + l, W * sizeof(float));
                    } else {
                        for (int64_t i = 0; i < W; i++) to[i] = i < group - l ? from[l + i] : 0.0f;
                    }
                }
            }
        }
        return;
    }
    for (int64_t l0 = 0; l0 < lines; l0 += W) {
        const int64_t n = std::min(W, lines - l0);
        float* to = dst + l0 * k;
        const float* from = src + l0 * line;
        int64_t p = 0;
        if (n == W)
            for (; p + V <= k; p += V)
                for (int64_t i = 0; i < W; i += V)
                    transpose(from + i * line + p, line, std::min(V, W - i), to + p * W + i, W);
        for (; p < k; p++) {
            for (int64_t i = 0; i < n; i++) to[p * W + i] = from[i * line + p];
            for (int64_t i = n; i < W; i++) to[p * W + i] = 0.0f;
        }
    }
}

// c[MR][NR] (+)= a[k][MR]^T b[k][NR]; a_step: stride of a along k.
inline __attribute__((always_inline)) void tile(int64_t k, const float* a, int64_t a_step, const float* b, float* c,
                                                int64_t ldc, bool add) {
    Vector acc[MR][2];
    for (int i = 0; i < MR; i++) {
        __builtin_prefetch(c + i * ldc);
        __builtin_prefetch(c + i * ldc + V);
        acc[i][0] = acc[i][1] = Vector{};
    }
    for (int64_t p = 0; p < k; p++) {
        Vector b0 = *reinterpret_cast<const Vector*>(b), b1 = *reinterpret_cast<const Vector*>(b + V);
        __builtin_prefetch(b + 16 * NR);
        __builtin_prefetch(b + 16 * NR + V);
#pragma GCC unroll 14
        for (int i = 0; i < MR; i++) {
            Vector x = a[i] - Vector{};
            acc[i][0] += x * b0;
            acc[i][1] += x * b1;
        }
        a += a_step;
        b += NR;
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < 2; j++) {
            Anywhere* to = reinterpret_cast<Anywhere*>(c + i * ldc + V * j);
            *to = add ? *to + acc[i][j] : acc[i][j];
        }
}

// The same for a partial tile of rows x cols.
inline void tile_part(int64_t k, const float* a, int64_t a_step, const float* b, float* c, int64_t ldc, bool add,
                      int64_t rows, int64_t cols) {
    if (rows >= MR && cols >= NR) return tile(k, a, a_step, b, c, ldc, add);
    alignas(64) float full[MR * NR];
    tile(k, a, a_step, b, full, NR, false);
    for (int64_t i = 0; i < std::min(rows, MR); i++)
        for (int64_t j = 0; j < std::min(cols, NR); j++)
            c[i * ldc + j] = add ? c[i * ldc + j] + full[i * NR + j] : full[i * NR + j];
}

TILE_TARGET_END

}  // namespace trident::TILES
