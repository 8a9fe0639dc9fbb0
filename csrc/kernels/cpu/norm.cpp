// RMSNorm and LayerNorm on the CPU. A row is read from memory once; later passes over it read from L1.

#include <vector>

#include "kernels/cpu/cpu.h"

namespace trident {

namespace {

// sum = x + residual, rounded to T.
template <class T>
INLINE void add_row(const T* x, const T* residual, T* sum, int64_t h) {
#pragma omp simd
    for (int64_t i = 0; i < h; i++) put(sum[i], wide(x[i]) + wide(residual[i]));
}

template <class T>
INLINE void rms_row(const T* x, const T* w, T* y, Wide<T>* scale, int64_t h, double eps, double offset) {
    using W = Wide<T>;
    W sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < h; i++) sum += wide(x[i]) * wide(x[i]);
    const W s = W(1) / std::sqrt(sum / W(h) + W(eps)), more = W(offset);
    *scale = s;
    if (offset == 0) {
#pragma omp simd
        for (int64_t i = 0; i < h; i++) put(y[i], rounded<T>(wide(x[i]) * s) * wide(w[i]));
    } else {
#pragma omp simd
        for (int64_t i = 0; i < h; i++) put(y[i], wide(x[i]) * s * (wide(w[i]) + more));
    }
}

// Computes gx, plus the gradient `more` of the residual sum if not null, and adds the row's part of the weight's
// gradient to gw.
template <class T>
INLINE void rms_row_backward(const T* g, const T* more, const T* x, const T* w, Wide<T> s, T* gx, Wide<T>* gw,
                             int64_t h, Wide<T> offset) {
    using W = Wide<T>;
    W along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < h; i++) {
        const W normed = wide(x[i]) * s, gn = wide(g[i]) * normed;
        gw[i] += gn;
        along += gn * (wide(w[i]) + offset);
    }
    along /= W(h);
    if (more) {
#pragma omp simd
        for (int64_t i = 0; i < h; i++)
            put(gx[i], wide(more[i]) + s * (wide(g[i]) * (wide(w[i]) + offset) - wide(x[i]) * s * along));
    } else {
#pragma omp simd
        for (int64_t i = 0; i < h; i++) put(gx[i], s * (wide(g[i]) * (wide(w[i]) + offset) - wide(x[i]) * s * along));
    }
}

template <class T>
INLINE void layer_row(const T* x, const T* w, const T* b, T* y, Wide<T>* mean, Wide<T>* scale, int64_t h, double eps) {
    using W = Wide<T>;
    W sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < h; i++) sum += wide(x[i]);
    const W middle = sum / W(h);
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < h; i++) squares += (wide(x[i]) - middle) * (wide(x[i]) - middle);
    const W s = W(1) / std::sqrt(squares / W(h) + W(eps));
    *mean = middle;
    *scale = s;
#pragma omp simd
    for (int64_t i = 0; i < h; i++) put(y[i], (wide(x[i]) - middle) * s * wide(w[i]) + wide(b[i]));
}

template <class T>
INLINE void layer_row_backward(const T* g, const T* more, const T* x, const T* w, Wide<T> mean, Wide<T> s, T* gx,
                               Wide<T>* gw, Wide<T>* gb, int64_t h) {
    using W = Wide<T>;
    W level = 0, along = 0;
#pragma omp simd reduction(+ : level, along)
    for (int64_t i = 0; i < h; i++) {
        const W normed = (wide(x[i]) - mean) * s, gn = wide(g[i]) * normed;
        gw[i] += gn;
        gb[i] += wide(g[i]);
        along += gn * wide(w[i]);
        level += wide(g[i]) * wide(w[i]);
    }
    along /= W(h);
    level /= W(h);
    if (more) {
#pragma omp simd
        for (int64_t i = 0; i < h; i++)
            put(gx[i], wide(more[i]) + s * (wide(g[i]) * wide(w[i]) - level - (wide(x[i]) - mean) * s * along));
    } else {
#pragma omp simd
        for (int64_t i = 0; i < h; i++)
            put(gx[i], s * (wide(g[i]) * wide(w[i]) - level - (wide(x[i]) - mean) * s * along));
    }
}

#define FOR_TYPE(T)                                                                                                 \
    CLONES void rms_rows(const T* x, const T* r, T* sum, const T* w, T* y, Wide<T>* s, int64_t a, int64_t z,        \
                         int64_t h, double eps, double offset) {                                                    \
        for (int64_t i = a; i < z; i++) {                                                                           \
            if (r) add_row(x + i * h, r + i * h, sum + i * h, h);                                                   \
            rms_row((r ? sum : x) + i * h, w, y + i * h, s + i, h, eps, offset);                                    \
        }                                                                                                           \
    }                                                                                                               \
    CLONES void rms_rows_backward(const T* g, const T* more, const T* x, const T* w, const Wide<T>* s, T* gx,       \
                                  Wide<T>* gw, int64_t a, int64_t z, int64_t h, Wide<T> offset) {                   \
        for (int64_t i = a; i < z; i++)                                                                             \
            rms_row_backward(g + i * h, more ? more + i * h : more, x + i * h, w, s[i], gx + i * h, gw, h, offset); \
    }                                                                                                               \
    CLONES void layer_rows(const T* x, const T* r, T* sum, const T* w, const T* b, T* y, Wide<T>* stats, int64_t a, \
                           int64_t z, int64_t rows, int64_t h, double eps) {                                        \
        for (int64_t i = a; i < z; i++) {                                                                           \
            if (r) add_row(x + i * h, r + i * h, sum + i * h, h);                                                   \
            layer_row((r ? sum : x) + i * h, w, b, y + i * h, stats + i, stats + rows + i, h, eps);                 \
        }                                                                                                           \
    }                                                                                                               \
    CLONES void layer_rows_backward(const T* g, const T* more, const T* x, const T* w, const Wide<T>* stats, T* gx, \
                                    Wide<T>* gw, Wide<T>* gb, int64_t a, int64_t z, int64_t rows, int64_t h) {      \
        for (int64_t i = a; i < z; i++)                                                                             \
            layer_row_backward(g + i * h, more ? more + i * h : more, x + i * h, w, stats[i], stats[rows + i],      \
                               gx + i * h, gw, gb, h);                                                              \
    }
FOR_TYPE(float)
FOR_TYPE(double)
FOR_TYPE(bf16)
FOR_TYPE(f16)

// Sums `width` numbers over all rows; f(first row, last row, to) adds up a block of rows. The blocks are then added in
// sequence, so that the order of a sum depends on the number of rows, not on the threads.
template <class W, class F>
std::vector<W> sum_by_blocks(int64_t rows, int64_t width, int threads, F f) {
    constexpr int64_t BLOCK = 64;
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
    std::vector<W> parts(size_t(blocks * width), W(0)), sums(size_t(width), W(0));
    split(blocks, rows * width, threads, [&](int64_t a, int64_t z) {
        for (int64_t i = a; i < z; i++) f(i * BLOCK, std::min(rows, (i + 1) * BLOCK), parts.data() + i * width);
    });
    for (int64_t i = 0; i < blocks; i++)
        for (int64_t j = 0; j < width; j++) sums[size_t(j)] += parts[size_t(i * width + j)];
    return sums;
}

}  // namespace

template <class T>
void rms_norm(const T* x, const T* residual, T* sum, const T* w, T* y, Wide<T>* scale, int64_t rows, int64_t h,
              double eps, double offset, int threads) {
    split(rows, rows * h, threads,
          [=](int64_t a, int64_t z) { rms_rows(x, residual, sum, w, y, scale, a, z, h, eps, offset); });
}

template <class T>
void rms_norm_backward(const T* grad, const T* grad_sum, const T* x, const T* w, const Wide<T>* scale, T* gx, T* gw,
                       int64_t rows, int64_t h, double offset, int threads) {
    using W = Wide<T>;
    const auto sums = sum_by_blocks<W>(rows, h, threads, [=](int64_t a, int64_t z, W* to) {
        rms_rows_backward(grad, grad_sum, x, w, scale, gx, to, a, z, h, W(offset));
    });
    for (int64_t j = 0; j < h; j++) put(gw[j], sums[size_t(j)]);
}

template <class T>
void layer_norm(const T* x, const T* residual, T* sum, const T* w, const T* b, T* y, Wide<T>* stats, int64_t rows,
                int64_t h, double eps, int threads) {
    split(rows, rows * h, threads,
          [=](int64_t a, int64_t z) { layer_rows(x, residual, sum, w, b, y, stats, a, z, rows, h, eps); });
}

template <class T>
void layer_norm_backward(const T* grad, const T* grad_sum, const T* x, const T* w, const Wide<T>* stats, T* gx, T* gw,
                         T* gb, int64_t rows, int64_t h, int threads) {
    using W = Wide<T>;
    const auto sums = sum_by_blocks<W>(rows, 2 * h, threads, [=](int64_t a, int64_t z, W* to) {
        layer_rows_backward(grad, grad_sum, x, w, stats, gx, to, to + h, a, z, rows, h);
    });
    for (int64_t j = 0; j < h; j++) put(gw[j], sums[size_t(j)]), put(gb[j], sums[size_t(h + j)]);
}

#define INSTANTIATE(T)                                                                                                \
    template void rms_norm<T>(const T*, const T*, T*, const T*, T*, Wide<T>*, int64_t, int64_t, double, double, int); \
    template void rms_norm_backward<T>(const T*, const T*, const T*, const T*, const Wide<T>*, T*, T*, int64_t,       \
                                       int64_t, double, int);                                                         \
    template void layer_norm<T>(const T*, const T*, T*, const T*, const T*, T*, Wide<T>*, int64_t, int64_t, double,   \
                                int);                                                                                 \
    template void layer_norm_backward<T>(const T*, const T*, const T*, const T*, const Wide<T>*, T*, T*, T*, int64_t, \
                                         int64_t, int);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
INSTANTIATE(f16)

}  // namespace trident
