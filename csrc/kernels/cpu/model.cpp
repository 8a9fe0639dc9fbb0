// Gated activations, RoPE and cross entropy on the CPU.

#include <cstring>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/exp.h"

namespace trident {

namespace {

// ---- gated activations: act(gate) * up

// The activations of Kind (kernels.h): the value at x, or the value and the derivative.

template <class W>
struct Silu {
    static INLINE W value(W x) { return x / (W(1) + exp_of(-x)); }
    static INLINE W slope(W x, W* value) {
        const W sigmoid = W(1) / (W(1) + exp_of(-x));
        *value = x * sigmoid;
        return sigmoid * (W(1) + x * (W(1) - sigmoid));
    }
};

// The standard normal distribution: density and CDF at x.
INLINE double normal(double x, double* density) {
    *density = 0.3989422804014327 * std::exp(-0.5 * x * x);
    return 0.5 * std::erfc(-0.7071067811865476 * x);
}

// Error at most 1e-7, also relative to small values: erfc(z) = exp(-z^2) t Q(t), t = 1 / (1 + 0.4 z), Q fitted to 2e-9
// on [0, 7].
INLINE float normal(float x, float* density) {
    const float e = exp_of(-0.5f * x * x), t = 1.0f / (1.0f + 0.4f * 0.70710678f * std::fabs(x));
    float q = -3.613690658e-2f;
    q = q * t + 2.344312412e-1f;
    q = q * t - 5.868744442e-1f;
    q = q * t + 6.686697849e-1f;
    q = q * t - 3.889256560e-1f;
    q = q * t + 3.305682255e-1f;
    q = q * t + 1.084721893e-1f;
    q = q * t + 2.197169628e-1f;
    q = q * t + 2.243378081e-1f;
    q = q * t + 2.257407971e-1f;
    *density = 0.39894228f * e;
    const float tail = 0.5f * e * t * q;
    return x < 0.0f ? tail : 1.0f - tail;
}

template <class W>
struct Gelu {
    static INLINE W value(W x) {
        W density;
        return x * normal(x, &density);
    }
    static INLINE W slope(W x, W* value) {
        W density;
        const W below = normal(x, &density);
        *value = x * below;
        return below + x * density;
    }
};

// x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
template <class W>
struct GeluTanh {
    static constexpr W A = W(1.5957691216057308), B = W(1.5957691216057308 * 0.044715);
    static INLINE W value(W x) { return x / (W(1) + exp_of(-x * (A + B * x * x))); }
    static INLINE W slope(W x, W* value) {
        const W sigmoid = W(1) / (W(1) + exp_of(-x * (A + B * x * x)));
        *value = x * sigmoid;
        return sigmoid * (W(1) + x * (W(1) - sigmoid) * (A + W(3) * B * x * x));
    }
};

template <class Act, class T>
INLINE void gated_row(const T* gate, const T* up, T* y, int64_t f) {
#pragma omp simd
    for (int64_t i = 0; i < f; i++) put(y[i], Act::value(wide(gate[i])) * wide(up[i]));
}

template <class Act, class T>
INLINE void gated_row_backward(const T* grad, const T* gate, const T* up, T* ggate, T* gup, int64_t f) {
    using W = Wide<T>;
#pragma omp simd
    for (int64_t i = 0; i < f; i++) {
        const W g = wide(grad[i]);
        W value;
        const W slope = Act::slope(wide(gate[i]), &value);
        put(gup[i], g * value);
        put(ggate[i], g * wide(up[i]) * slope);
    }
}

// ---- RoPE of one head at one position. sign -1 rotates back.

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
    constexpr int64_t BLOCK = 2048;  // stays in L1 between the pass for the maximum and the pass for the sum
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

#define FOR_TYPE(T)                                                                                                   \
    CLONES void gated_rows(const T* x, T* y, int kind, int64_t a, int64_t z, int64_t f) {                             \
        for (int64_t i = a; i < z; i++) {                                                                             \
            const T *gate = x + 2 * i * f, *up = gate + f;                                                            \
            if (kind == SILU) gated_row<Silu<Wide<T>>>(gate, up, y + i * f, f);                                       \
            if (kind == GELU) gated_row<Gelu<Wide<T>>>(gate, up, y + i * f, f);                                       \
            if (kind == GELU_TANH) gated_row<GeluTanh<Wide<T>>>(gate, up, y + i * f, f);                              \
        }                                                                                                             \
    }                                                                                                                 \
    CLONES void gated_rows_backward(const T* g, const T* x, T* gx, int kind, int64_t a, int64_t z, int64_t f) {       \
        for (int64_t i = a; i < z; i++) {                                                                             \
            const T *gate = x + 2 * i * f, *up = gate + f;                                                            \
            T *ggate = gx + 2 * i * f, *gup = ggate + f;                                                              \
            if (kind == SILU) gated_row_backward<Silu<Wide<T>>>(g + i * f, gate, up, ggate, gup, f);                  \
            if (kind == GELU) gated_row_backward<Gelu<Wide<T>>>(g + i * f, gate, up, ggate, gup, f);                  \
            if (kind == GELU_TANH) gated_row_backward<GeluTanh<Wide<T>>>(g + i * f, gate, up, ggate, gup, f);         \
        }                                                                                                             \
    }                                                                                                                 \
    CLONES void rotate_heads(const T* x, int64_t x_step, T* y, int64_t y_step, const T* cos, const T* sin,            \
                             int64_t heads, int64_t r, int64_t d, Wide<T> sign) {                                     \
        for (int64_t i = 0; i < heads; i++) rotate(x + i * x_step, cos, sin, y + i * y_step, r, d, sign);             \
    }                                                                                                                 \
    CLONES void stats_rows(const T* x, const int64_t* t, Wide<T>* out, int64_t a, int64_t z, int64_t rows, int64_t v, \
                           int64_t valid) {                                                                           \
        for (int64_t i = a; i < z; i++)                                                                               \
            stats_row(x + i * v, t[i], out + i, out + rows + i, out + 2 * rows + i, valid);                           \
    }                                                                                                                 \
    CLONES void gradient_rows(T* x, const int64_t* t, const Wide<T>* peak, const Wide<T>* scale, const Wide<T>* g,    \
                              int64_t a, int64_t z, int64_t v, int64_t valid) {                                       \
        for (int64_t i = a; i < z; i++) gradient_row(x + i * v, t[i], peak[i], scale[i], g[i], v, valid);             \
    }
FOR_TYPE(float)
FOR_TYPE(double)
FOR_TYPE(bf16)
FOR_TYPE(f16)

}  // namespace

template <class T>
void gated(const T* fused, T* y, int kind, int64_t rows, int64_t f, int threads) {
    split(rows, rows * f, threads, [=](int64_t a, int64_t z) { gated_rows(fused, y, kind, a, z, f); });
}

template <class T>
void gated_backward(const T* grad, const T* fused, T* gfused, int kind, int64_t rows, int64_t f, int threads) {
    split(rows, rows * f, threads,
          [=](int64_t a, int64_t z) { gated_rows_backward(grad, fused, gfused, kind, a, z, f); });
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
                for (int64_t h = 0; h < x.m; h++)
                    std::memcpy(row + h * x.d, from + h * v.head, size_t(x.d) * sizeof(T));
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

#define INSTANTIATE(T)                                                                                                \
    template void gated<T>(const T*, T*, int, int64_t, int64_t, int);                                                 \
    template void gated_backward<T>(const T*, const T*, T*, int, int64_t, int64_t, int);                              \
    template void rope<T>(const T*, const T*, const T*, Heads<T>, Heads<T>, Heads<T>, HeadShape, int);                \
    template void rope_backward<T>(Heads<const T>, Heads<const T>, Heads<const T>, const T*, const T*, T*, HeadShape, \
                                   int);                                                                              \
    template void softmax_stats<T>(const T*, const int64_t*, Wide<T>*, int64_t, int64_t, int64_t, int);               \
    template void softmax_gradient<T>(T*, const int64_t*, const Wide<T>*, const Wide<T>*, const Wide<T>*, int64_t,    \
                                      int64_t, int64_t, int);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
INSTANTIATE(f16)

}  // namespace trident
