// C (+)= A B in float32 for AVX-512 (Goto & van de Geijn 2008: pack blocks, keep a tile of C in registers).
//
// Why our own: MKL, which torch calls, reaches 0.78 of the FMA peak of AMD processors, this 0.9. On Intel's it is as good
// as this, so there `sgemm_wins` says no. And here the result of a row never depends on how many rows a call has, nor on
// the number of threads: each element is one running sum over k, in blocks whose borders depend on K only.
//
// A tile of C is 14 x 32: 28 accumulators, two vectors of B, one broadcast of A. A block of B (up to 512 x 256, 512 KiB)
// stays in L2 while the panels of A stream past it. Threads share C by columns or rows, whichever there are more of, and
// pack for themselves: no barrier.

#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace trident {

namespace {

constexpr int64_t MR = 14, NR = 32;
constexpr int64_t KC = 512, NC = 8 * NR, MC = 150 * MR;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

Buffer allocate(int64_t count) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, size_t(count) * sizeof(float)) != 0) throw std::bad_alloc();
    return Buffer(static_cast<float*>(p));
}

// Packing buffers live as long as their thread: a step makes hundreds of products.
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

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,fma,avx2")

namespace {

typedef float v16 __attribute__((vector_size(64), aligned(64)));
typedef float u16 __attribute__((vector_size(64), aligned(4)));  // the same, anywhere

// Panels of W lines (rows of A, columns of B): dst[panel][k][W]. line: stride between lines, step: along k.
template <int64_t W>
void pack(const float* src, int64_t line, int64_t step, int64_t lines, int64_t k, float* dst) {
    if (line == 1) {  // lines lie side by side: copy runs, several panels at a time to stay within a page
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
        int64_t n = std::min(W, lines - l0);
        float* to = dst + l0 * k;
        const float* from = src + l0 * line;
        if (n < W) std::memset(to, 0, size_t(W * k) * sizeof(float));
        constexpr int64_t B = 16;  // of k at a time: one cache line of each source line
        for (int64_t p0 = 0; p0 < k; p0 += B) {
            int64_t pn = std::min(B, k - p0);
            if (pn == B && n == W) {
                for (int64_t p = 0; p < B; p++)
                    for (int64_t i = 0; i < W; i++) to[(p0 + p) * W + i] = from[i * line + p0 + p];
            } else {
                for (int64_t p = 0; p < pn; p++)
                    for (int64_t i = 0; i < n; i++) to[(p0 + p) * W + i] = from[i * line + p0 + p];
            }
        }
    }
}

// c[14][32] (+)= a[k][14]^T b[k][32]
inline __attribute__((always_inline)) void tile(int64_t k, const float* a, const float* b, float* c, int64_t ldc,
                                                 bool add) {
    v16 acc[MR][2];
    for (int i = 0; i < MR; i++) {
        __builtin_prefetch(c + i * ldc);
        __builtin_prefetch(c + i * ldc + 16);
        acc[i][0] = acc[i][1] = v16{};
    }
    for (int64_t p = 0; p < k; p++) {
        v16 b0 = *reinterpret_cast<const v16*>(b), b1 = *reinterpret_cast<const v16*>(b + 16);
        __builtin_prefetch(b + 16 * NR);
        __builtin_prefetch(b + 16 * NR + 16);
#pragma GCC unroll 14
        for (int i = 0; i < MR; i++) {
            v16 x = a[i] - v16{};
            acc[i][0] += x * b0;
            acc[i][1] += x * b1;
        }
        a += MR;
        b += NR;
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < 2; j++) {
            u16* to = reinterpret_cast<u16*>(c + i * ldc + 16 * j);
            *to = add ? *to + acc[i][j] : acc[i][j];
        }
}

void edge(int64_t k, const float* a, const float* b, float* c, int64_t ldc, bool add, int64_t rows, int64_t cols) {
    alignas(64) float full[MR * NR];
    tile(k, a, b, full, NR, false);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) c[i * ldc + j] = add ? c[i * ldc + j] + full[i * NR + j] : full[i * NR + j];
}

void serial(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, bool add) {
    static thread_local Workspace space;
    const int64_t kc = ceil_div(k, ceil_div(k, KC));
    float* pa = space.get_a(std::min(ceil_div(m, MR) * MR, MC) * kc);
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
                        if (mb - i >= MR && nb - j >= NR)
                            tile(kb, pa + i * kb, pb + j * kb, to, ldc, more);
                        else
                            edge(kb, pa + i * kb, pb + j * kb, to, ldc, more, std::min(MR, mb - i), std::min(NR, nb - j));
                    }
            }
        }
    }
}

}  // namespace

#pragma GCC pop_options

bool sgemm_runs() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
}

bool sgemm_wins() { return sgemm_runs() && __builtin_cpu_is("amd"); }

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

#else

bool sgemm_runs() { return false; }
bool sgemm_wins() { return false; }
void sgemm(int64_t, int64_t, int64_t, Matrix, Matrix, float*, int64_t, bool, int) { std::abort(); }

#endif

}  // namespace trident
