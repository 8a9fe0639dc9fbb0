// CPU kernels of kernels.h. Every body is compiled for AVX-512, AVX2 and plain x86-64, and the loader picks (CLONES);
// on other processors once. Loops are written so that gcc vectorises them.

#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "exp.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

namespace trident {

namespace {

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

// ---- RMSNorm

template <class T>
INLINE void rms_norm_row(const T* x, const T* w, T* y, Wide<T>* scale, int64_t h, double eps) {
    using W = Wide<T>;
    W sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < h; i++) sum += wide(x[i]) * wide(x[i]);
    const W s = W(1) / std::sqrt(sum / W(h) + W(eps));
    *scale = s;
#pragma omp simd
    for (int64_t i = 0; i < h; i++) put(y[i], wide(x[i]) * s * wide(w[i]));
}

// Adds the row's part of the weight's gradient to gw.
template <class T>
INLINE void rms_norm_row_backward(const T* g, const T* x, const T* w, Wide<T> s, T* gx, Wide<T>* gw, int64_t h) {
    using W = Wide<T>;
    W along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < h; i++) {
        const W normed = wide(x[i]) * s, gn = wide(g[i]) * normed;
        gw[i] += gn;
        along += gn * wide(w[i]);
    }
    along /= W(h);
#pragma omp simd
    for (int64_t i = 0; i < h; i++) put(gx[i], s * (wide(g[i]) * wide(w[i]) - wide(x[i]) * s * along));
}

// ---- SwiGLU

template <class T>
INLINE void swiglu_row(const T* gate, const T* up, T* y, int64_t f) {
    using W = Wide<T>;
#pragma omp simd
    for (int64_t i = 0; i < f; i++) {
        const W g = wide(gate[i]);
        put(y[i], g / (W(1) + exp_of(-g)) * wide(up[i]));
    }
}

template <class T>
INLINE void swiglu_row_backward(const T* grad, const T* gate, const T* up, T* ggate, T* gup, int64_t f) {
    using W = Wide<T>;
#pragma omp simd
    for (int64_t i = 0; i < f; i++) {
        const W x = wide(gate[i]), g = wide(grad[i]), sigmoid = W(1) / (W(1) + exp_of(-x));
        put(gup[i], g * x * sigmoid);
        put(ggate[i], g * wide(up[i]) * sigmoid * (W(1) + x * (W(1) - sigmoid)));
    }
}

// ---- RoPE: one head of one position. sign -1 turns back.

template <class T>
INLINE void rotate(const T* x, const T* cos, const T* sin, T* y, int64_t r, int64_t d, Wide<T> sign) {
    using W = Wide<T>;
    const int64_t half = r / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const W a = wide(x[i]), b = wide(x[i + half]), c = wide(cos[i]), s = sign * wide(sin[i]);
        put(y[i], a * c - b * s);
        put(y[i + half], b * c + a * s);
    }
    std::memcpy(y + r, x + r, size_t(d - r) * sizeof(T));
}

// ---- Cross entropy

template <class T>
INLINE void stats_row(const T* x, int64_t target, Wide<T>* peak, Wide<T>* sum, Wide<T>* at, int64_t valid) {
    using W = Wide<T>;
    constexpr int64_t BLOCK = 2048;  // stays in the first cache between its maximum and its sum
    W best = -INFINITY, total = 0;
    for (int64_t i0 = 0; i0 < valid; i0 += BLOCK) {
        const int64_t i1 = std::min(valid, i0 + BLOCK);
        W top = best;
#pragma omp simd reduction(max : top)
        for (int64_t i = i0; i < i1; i++) top = wide(x[i]) > top ? wide(x[i]) : top;
        W part = 0;
        const W shift = top == -INFINITY ? W(0) : top;
#pragma omp simd reduction(+ : part)
        for (int64_t i = i0; i < i1; i++) part += exp_of(wide(x[i]) - shift);
        total = (best == -INFINITY ? W(0) : total * exp_of(best - shift)) + part;
        best = top;
    }
    *peak = best;
    *sum = total;
    *at = target >= 0 && target < valid ? wide(x[target]) : W(0);
}

template <class T>
INLINE void gradient_row(T* x, int64_t target, Wide<T> peak, Wide<T> scale, Wide<T> g, int64_t v, int64_t valid) {
    using W = Wide<T>;
    const bool inside = target >= 0 && target < valid;
    const W at = inside ? wide(x[target]) : W(0);
#pragma omp simd
    for (int64_t i = 0; i < valid; i++) put(x[i], exp_of(wide(x[i]) - peak) * scale);
    if (inside) put(x[target], exp_of(at - peak) * scale - g);
    std::memset(x + valid, 0, size_t(v - valid) * sizeof(T));
}

// ---- AdamW

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

// Clones cannot be templates: one set of plain functions for each type.
#define FOR_TYPE(T)                                                                                                     \
    CLONES void rms_norm_rows(const T* x, const T* w, T* y, Wide<T>* s, int64_t a, int64_t z, int64_t h, double eps) { \
        for (int64_t i = a; i < z; i++) rms_norm_row(x + i * h, w, y + i * h, s + i, h, eps);                          \
    }                                                                                                                   \
    CLONES void rms_norm_rows_backward(const T* g, const T* x, const T* w, const Wide<T>* s, T* gx, Wide<T>* gw,       \
                                       int64_t a, int64_t z, int64_t h) {                                              \
        for (int64_t i = a; i < z; i++) rms_norm_row_backward(g + i * h, x + i * h, w, s[i], gx + i * h, gw, h);       \
    }                                                                                                                   \
    CLONES void swiglu_rows(const T* x, T* y, int64_t a, int64_t z, int64_t f) {                                       \
        for (int64_t i = a; i < z; i++) swiglu_row(x + 2 * i * f, x + (2 * i + 1) * f, y + i * f, f);                  \
    }                                                                                                                   \
    CLONES void swiglu_rows_backward(const T* g, const T* x, T* gx, int64_t a, int64_t z, int64_t f) {                 \
        for (int64_t i = a; i < z; i++)                                                                                 \
            swiglu_row_backward(g + i * f, x + 2 * i * f, x + (2 * i + 1) * f, gx + 2 * i * f, gx + (2 * i + 1) * f, f); \
    }                                                                                                                   \
    CLONES void rotate_heads(const T* x, int64_t x_step, T* y, int64_t y_step, const T* cos, const T* sin,             \
                             int64_t heads, int64_t r, int64_t d, Wide<T> sign) {                                      \
        for (int64_t i = 0; i < heads; i++) rotate(x + i * x_step, cos, sin, y + i * y_step, r, d, sign);              \
    }                                                                                                                   \
    CLONES void stats_rows(const T* x, const int64_t* t, Wide<T>* out, int64_t a, int64_t z, int64_t rows, int64_t v,  \
                           int64_t valid) {                                                                             \
        for (int64_t i = a; i < z; i++)                                                                                 \
            stats_row(x + i * v, t[i], out + i, out + rows + i, out + 2 * rows + i, valid);                            \
    }                                                                                                                   \
    CLONES void gradient_rows(T* x, const int64_t* t, const Wide<T>* peak, const Wide<T>* scale, const Wide<T>* g,     \
                              int64_t a, int64_t z, int64_t v, int64_t valid) {                                        \
        for (int64_t i = a; i < z; i++) gradient_row(x + i * v, t[i], peak[i], scale[i], g[i], v, valid);              \
    }
FOR_TYPE(float)
FOR_TYPE(double)
FOR_TYPE(bf16)
FOR_TYPE(f16)

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

}  // namespace

template <class T>
void rms_norm(const T* x, const T* w, T* y, Wide<T>* scale, int64_t rows, int64_t h, double eps, int threads) {
    split(rows, rows * h, threads, [=](int64_t a, int64_t z) { rms_norm_rows(x, w, y, scale, a, z, h, eps); });
}

template <class T>
void rms_norm_backward(const T* grad, const T* x, const T* w, const Wide<T>* scale, T* gx, T* gw, int64_t rows, int64_t h,
                       int threads) {
    using W = Wide<T>;
    constexpr int64_t BLOCK = 64;  // rows whose parts are added first: the order of the sum must not follow the threads
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
    std::vector<W> parts(size_t(blocks * h), W(0));
    W* out = parts.data();
    split(blocks, rows * h, threads, [=](int64_t a, int64_t z) {
        for (int64_t i = a; i < z; i++)
            rms_norm_rows_backward(grad, x, w, scale, gx, out + i * h, i * BLOCK, std::min(rows, (i + 1) * BLOCK), h);
    });
    for (int64_t j = 0; j < h; j++) {
        W sum = 0;
        for (int64_t i = 0; i < blocks; i++) sum += out[i * h + j];
        put(gw[j], sum);
    }
}

template <class T>
void swiglu(const T* fused, T* y, int64_t rows, int64_t f, int threads) {
    split(rows, rows * f, threads, [=](int64_t a, int64_t z) { swiglu_rows(fused, y, a, z, f); });
}

template <class T>
void swiglu_backward(const T* grad, const T* fused, T* gfused, int64_t rows, int64_t f, int threads) {
    split(rows, rows * f, threads, [=](int64_t a, int64_t z) { swiglu_rows_backward(grad, fused, gfused, a, z, f); });
}

template <class T>
void rope(const T* fused, const T* cos, const T* sin, Heads<T> q, Heads<T> k, Heads<T> v, HeadShape x, int threads) {
    const int64_t width = (x.n + 2 * x.m) * x.d, half = x.r / 2;
    split(x.s, x.s * x.b * width, threads, [=](int64_t a, int64_t z) {
        for (int64_t j = 0; j < x.b; j++)
            for (int64_t i = a; i < z; i++) {
                const T *row = fused + (i * x.b + j) * width, *c = cos + i * half, *s = sin + i * half;
                T* to = q.p + j * q.sample + i * q.position;
                rotate_heads(row, x.d, to, q.head, c, s, x.n, x.r, x.d, 1);
                to = k.p + j * k.sample + i * k.position;
                rotate_heads(row + x.n * x.d, x.d, to, k.head, c, s, x.m, x.r, x.d, 1);
                row += (x.n + x.m) * x.d;
                to = v.p + j * v.sample + i * v.position;
                for (int64_t h = 0; h < x.m; h++) std::memcpy(to + h * v.head, row + h * x.d, size_t(x.d) * sizeof(T));
            }
    });
}

template <class T>
void rope_backward(Heads<const T> q, Heads<const T> k, Heads<const T> v, const T* cos, const T* sin, T* fused,
                   HeadShape x, int threads) {
    const int64_t width = (x.n + 2 * x.m) * x.d, half = x.r / 2;
    split(x.s, x.s * x.b * width, threads, [=](int64_t a, int64_t z) {
        for (int64_t j = 0; j < x.b; j++)
            for (int64_t i = a; i < z; i++) {
                T* row = fused + (i * x.b + j) * width;
                const T *c = cos + i * half, *s = sin + i * half;
                rotate_heads(q.p + j * q.sample + i * q.position, q.head, row, x.d, c, s, x.n, x.r, x.d, -1);
                row += x.n * x.d;
                rotate_heads(k.p + j * k.sample + i * k.position, k.head, row, x.d, c, s, x.m, x.r, x.d, -1);
                row += x.m * x.d;
                const T* from = v.p + j * v.sample + i * v.position;
                for (int64_t h = 0; h < x.m; h++) std::memcpy(row + h * x.d, from + h * v.head, size_t(x.d) * sizeof(T));
            }
    });
}

template <class T>
void softmax_stats(const T* logits, const int64_t* target, Wide<T>* stats, int64_t rows, int64_t v, int64_t valid,
                   int threads) {
    split(rows, rows * v, threads,
          [=](int64_t a, int64_t z) { stats_rows(logits, target, stats, a, z, rows, v, valid); });
}

template <class T>
void softmax_gradient(T* logits, const int64_t* target, const Wide<T>* peak, const Wide<T>* scale, const Wide<T>* grad,
                      int64_t rows, int64_t v, int64_t valid, int threads) {
    split(rows, rows * v, threads,
          [=](int64_t a, int64_t z) { gradient_rows(logits, target, peak, scale, grad, a, z, v, valid); });
}

template <class W, class T>
void adamw(W* master, const W* grad, W* m, W* v, T* values, int64_t n, AdamW how, int threads) {
    const double correction1 = 1 - std::pow(how.beta1, double(how.step));
    const double correction2 = 1 - std::pow(how.beta2, double(how.step));
    const Factors<W> f{W(1 - how.lr * how.weight_decay), W(how.beta1),           W(how.beta2),
                       W(1 - how.beta1),                 W(1 - how.beta2),       W(how.lr / correction1),
                       W(std::sqrt(correction2)),        W(how.eps),             W(how.scale)};
    constexpr int64_t BLOCK = 4096;  // masters are still in the first cache when they are rounded
    split((n + BLOCK - 1) / BLOCK, n, threads, [=](int64_t a, int64_t z) {
        for (int64_t i = a * BLOCK; i < std::min(n, z * BLOCK); i += BLOCK) {
            const int64_t count = std::min(BLOCK, n - i);
            adamw_part(master + i, grad + i, m + i, v + i, count, f);
            if (values) round_part(master + i, values + i, count);
        }
    });
}

#define INSTANTIATE(T)                                                                                                  \
    template void rms_norm<T>(const T*, const T*, T*, Wide<T>*, int64_t, int64_t, double, int);                        \
    template void rms_norm_backward<T>(const T*, const T*, const T*, const Wide<T>*, T*, T*, int64_t, int64_t, int);   \
    template void swiglu<T>(const T*, T*, int64_t, int64_t, int);                                                      \
    template void swiglu_backward<T>(const T*, const T*, T*, int64_t, int64_t, int);                                   \
    template void rope<T>(const T*, const T*, const T*, Heads<T>, Heads<T>, Heads<T>, HeadShape, int);                 \
    template void rope_backward<T>(Heads<const T>, Heads<const T>, Heads<const T>, const T*, const T*, T*, HeadShape,  \
                                   int);                                                                                \
    template void softmax_stats<T>(const T*, const int64_t*, Wide<T>*, int64_t, int64_t, int64_t, int);                \
    template void softmax_gradient<T>(T*, const int64_t*, const Wide<T>*, const Wide<T>*, const Wide<T>*, int64_t,      \
                                      int64_t, int64_t, int);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
INSTANTIATE(f16)
template void adamw<float, float>(float*, const float*, float*, float*, float*, int64_t, AdamW, int);
template void adamw<float, bf16>(float*, const float*, float*, float*, bf16*, int64_t, AdamW, int);
template void adamw<float, f16>(float*, const float*, float*, float*, f16*, int64_t, AdamW, int);
template void adamw<double, double>(double*, const double*, double*, double*, double*, int64_t, AdamW, int);

}  // namespace trident
