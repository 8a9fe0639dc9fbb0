// C (+)= A B in float32 (Goto & van de Geijn 2008: pack blocks, keep a tile of C in registers).
//
// Why a custom GEMM: on a Zen 4, MKL, which torch calls, reaches 0.82 of the FMA peak, this one 0.92; on a Zen 3 (no
// AVX-512) this one is 1.23 times as fast as MKL at 4096^3 (docs/performance.md). On processors not made by AMD,
// `sgemm_wins` returns false. Also, a row of the result never depends on the number of rows of the call or on the
// number of threads: each element is one running sum over k, in blocks whose boundaries depend only on K.
//
// A block of B (up to 512 x 256, 512 KiB; half of that with AVX2) stays in L2 while the panels of A stream past it.
// Threads divide C by columns or by rows, whichever are more, and each packs its own blocks, so no barrier is needed.
#pragma once

#include "kernels/cpu/tile.h"

namespace trident::TILES {

namespace {

constexpr int64_t KC = 512, NC = 8 * NR, MC = 150 * MR;

// Packing buffers live as long as their thread, because a step calls hundreds of GEMMs.
struct Workspace {
    Buffer a, b;
    int64_t a_size = 0, b_size = 0;
    float* get_a(int64_t n) {
        if (n > a_size) a = allocate(n), a_size = n;
        return a.get();
    }
    float* get_b(int64_t n) {
        if (n > b_size) b = allocate(n), b_size = n;
        return b.get();
    }
};

TILE_TARGET_BEGIN

void serial(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, bool add) {
    static thread_local Workspace space;
    const int64_t kc = ceil_div(k, ceil_div(k, KC));
    float* pa = space.get_a(std::min(ceil_div(m, MR) * MR, MC) * kc + 2);
    float* pb = space.get_b(NC * kc);
    for (int64_t k0 = 0; k0 < k; k0 += kc) {
        const int64_t kb = std::min(kc, k - k0);
        const bool more = add || k0 > 0;
        for (int64_t m0 = 0; m0 < m; m0 += MC) {
            const int64_t mb = std::min(MC, m - m0);
            pack<MR>(a.p + m0 * a.row + k0 * a.col, a.row, a.col, mb, kb, pa);
            for (int64_t n0 = 0; n0 < n; n0 += NC) {
                const int64_t nb = std::min(NC, n - n0);
                pack<NR>(b.p + k0 * b.row + n0 * b.col, b.col, b.row, nb, kb, pb);
                for (int64_t i = 0; i < mb; i += MR)
                    for (int64_t j = 0; j < nb; j += NR) {
                        float* to = c + (m0 + i) * ldc + n0 + j;
                        tile_part(kb, pa + i * kb, MR, pb + j * kb, to, ldc, more, mb - i, nb - j);
                    }
            }
        }
    }
}

TILE_TARGET_END

}  // namespace

void sgemm(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, bool add, int threads) {
    if (m == 0 || n == 0) return;
    if (k == 0) {
        if (!add)
            for (int64_t i = 0; i < m; i++) std::memset(c + i * ldc, 0, size_t(n) * sizeof(float));
        return;
    }
    const bool by_columns = n >= m;
    const int64_t unit = by_columns ? NR : MR, units = ceil_div(by_columns ? n : m, unit);
    const int64_t parts = std::min<int64_t>(threads, m * n * k < 1 << 18 ? 1 : units);
#pragma omp parallel for num_threads(parts) schedule(static, 1) if (parts > 1)
    for (int64_t part = 0; part < parts; part++) {
        const int64_t begin = units * part / parts * unit;
        const int64_t end = std::min(units * (part + 1) / parts * unit, by_columns ? n : m);
        if (by_columns)
            serial(m, end - begin, k, a, {b.p + begin * b.col, b.row, b.col}, c + begin, ldc, add);
        else
            serial(end - begin, n, k, {a.p + begin * a.row, a.row, a.col}, b, c + begin * ldc, ldc, add);
    }
}

}  // namespace trident::TILES
