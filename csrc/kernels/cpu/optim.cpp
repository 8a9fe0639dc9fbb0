// The optimizer's kernels on flat buckets on the CPU: AdamW, and sums of squares for the gradient norm.

#include <vector>

#include "kernels/cpu/cpu.h"

namespace trident {

namespace {

template <class W>
struct Factors {
    W decay, beta1, beta2, rest1, rest2, rate, root, eps, scale;
};

template <class W>
INLINE void adamw_range(W* p, const W* g, W* m, W* v, int64_t n, Factors<W> f) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const W grad = g[i] * f.scale;
        const W first = m[i] + f.rest1 * (grad - m[i]), second = f.beta2 * v[i] + f.rest2 * (grad * grad);
        m[i] = first;
        v[i] = second;
        p[i] = p[i] * f.decay - f.rate * first / (std::sqrt(second) / f.root + f.eps);
    }
}

CLONES void adamw_part(float* p, const float* g, float* m, float* v, int64_t n, const Factors<float>& f) {
    adamw_range(p, g, m, v, n, f);
}
CLONES void adamw_part(double* p, const double* g, double* m, double* v, int64_t n, const Factors<double>& f) {
    adamw_range(p, g, m, v, n, f);
}

CLONES void round_part(const float* p, bf16* values, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) put(values[i], p[i]);
}
CLONES void round_part(const float* p, f16* values, int64_t n) {
    for (int64_t i = 0; i < n; i++) put(values[i], p[i]);
}
[[maybe_unused]] void round_part(const float*, float*, int64_t) {}
[[maybe_unused]] void round_part(const double*, double*, int64_t) {}

template <class T>
INLINE double squares(const T* x, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += double(wide(x[i])) * double(wide(x[i]));
    return sum;
}

CLONES double squares_part(const float* x, int64_t n) { return squares(x, n); }
CLONES double squares_part(const double* x, int64_t n) { return squares(x, n); }
CLONES double squares_part(const bf16* x, int64_t n) { return squares(x, n); }
CLONES double squares_part(const f16* x, int64_t n) { return squares(x, n); }

}  // namespace

template <class W, class T>
void adamw(W* master, const W* grad, W* m, W* v, T* values, int64_t n, AdamW how, int threads) {
    const double correction1 = 1 - std::pow(how.beta1, double(how.step));
    const double correction2 = 1 - std::pow(how.beta2, double(how.step));
    const Factors<W> f{W(1 - how.lr * how.weight_decay),
                       W(how.beta1),
                       W(how.beta2),
                       W(1 - how.beta1),
                       W(1 - how.beta2),
                       W(how.lr / correction1),
                       W(std::sqrt(correction2)),
                       W(how.eps),
                       W(how.scale)};
    constexpr int64_t BLOCK = 4096;  // master weights are still in L1 when they are rounded
    split((n + BLOCK - 1) / BLOCK, n, threads, [=](int64_t a, int64_t z) {
        for (int64_t i = a * BLOCK; i < std::min(n, z * BLOCK); i += BLOCK) {
            const int64_t count = std::min(BLOCK, n - i);
            adamw_part(master + i, grad + i, m + i, v + i, count, f);
            if (values) round_part(master + i, values + i, count);
        }
    });
}

template <class T>
void sum_squares(const T* x, int64_t, const int64_t* bounds, double* out, int64_t k, int threads) {
    // blocks count from the start of a range, so that its sum does not depend on its place or on the threads
    constexpr int64_t BLOCK = 8192;
    std::vector<int64_t> first(size_t(k) + 1, 0);  // number of the first block of each range
    for (int64_t i = 0; i < k; i++)
        first[size_t(i) + 1] = first[size_t(i)] + (bounds[2 * i + 1] - bounds[2 * i] + BLOCK - 1) / BLOCK;
    const int64_t blocks = first.back();
    std::vector<double> parts(static_cast<size_t>(blocks));
    split(blocks, blocks * BLOCK, threads, [&](int64_t a, int64_t z) {
        int64_t range = std::upper_bound(first.begin(), first.end(), a) - first.begin() - 1;
        for (int64_t block = a; block < z; block++) {
            while (block >= first[size_t(range) + 1]) range++;
            const int64_t begin = bounds[2 * range] + (block - first[size_t(range)]) * BLOCK;
            parts[size_t(block)] = squares_part(x + begin, std::min(BLOCK, bounds[2 * range + 1] - begin));
        }
    });
    for (int64_t i = 0; i < k; i++) {
        out[i] = 0;
        for (int64_t j = first[size_t(i)]; j < first[size_t(i) + 1]; j++) out[i] += parts[size_t(j)];
    }
}

template void adamw<float, float>(float*, const float*, float*, float*, float*, int64_t, AdamW, int);
template void adamw<float, bf16>(float*, const float*, float*, float*, bf16*, int64_t, AdamW, int);
template void adamw<float, f16>(float*, const float*, float*, float*, f16*, int64_t, AdamW, int);
template void adamw<double, double>(double*, const double*, double*, double*, double*, int64_t, AdamW, int);
template void sum_squares<float>(const float*, int64_t, const int64_t*, double*, int64_t, int);
template void sum_squares<double>(const double*, int64_t, const int64_t*, double*, int64_t, int);
template void sum_squares<bf16>(const bf16*, int64_t, const int64_t*, double*, int64_t, int);
template void sum_squares<f16>(const f16*, int64_t, const int64_t*, double*, int64_t, int);

}  // namespace trident
