// The CPU kernels behind the operators of ops/: raw pointers, no torch. Each says what a row is; rows never depend on one another.
//
// T: float, double, bf16 or f16, the type of activations. Wide<T>: what is computed in, float or (for double) double.
#pragma once

#include <cstdint>

namespace trident {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class T>
struct WideOf {
    using type = float;
};
template <>
struct WideOf<double> {
    using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

// y = x s w over rows of h, where s = scale[row] = 1 / sqrt(mean(x^2) + eps). offset 0: x s is rounded to T before it is
// multiplied by w; else by offset + w, and rounded once. residual (may be null): sum = x + residual, rounded to T, is
// written and takes x's place.
template <class T>
void rms_norm(const T* x, const T* residual, T* sum, const T* w, T* y, Wide<T>* scale, int64_t rows, int64_t h,
              double eps, double offset, int threads);

// gx of x (of the sum, where there was one), and gw[h] summed over the rows in an order that depends on their number only.
// grad_sum (may be null): the gradient that reaches x beside the norm, added to gx.
template <class T>
void rms_norm_backward(const T* grad, const T* grad_sum, const T* x, const T* w, const Wide<T>* scale, T* gx, T* gw,
                       int64_t rows, int64_t h, double offset, int threads);

// The same with the mean taken off first and b added: y = (x - mean) s w + b, stats[0][row] = mean, stats[1][row] = s.
template <class T>
void layer_norm(const T* x, const T* residual, T* sum, const T* w, const T* b, T* y, Wide<T>* stats, int64_t rows,
                int64_t h, double eps, int threads);
template <class T>
void layer_norm_backward(const T* grad, const T* grad_sum, const T* x, const T* w, const Wide<T>* stats, T* gx, T* gw,
                         T* gb, int64_t rows, int64_t h, int threads);

// What gates: x sigmoid(x), x times the normal distribution's integral up to x, the same by tanh.
enum Kind : int { SILU, GELU, GELU_TANH, KINDS };

// rows of 2 f: gate | up -> act(gate) * up, rows of f.
template <class T>
void gated(const T* fused, T* y, int kind, int64_t rows, int64_t f, int threads);
template <class T>
void gated_backward(const T* grad, const T* fused, T* gfused, int kind, int64_t rows, int64_t f, int threads);

// Sizes of a fused q|k|v: s positions, b samples, n query and m key/value heads of d, of which the first r are rotated.
struct HeadShape {
    int64_t s, b, n, m, d, r;
};

// A tensor [b, heads, s, d] with stride 1 along d.
template <class T>
struct Heads {
    T* p;
    int64_t sample, head, position;
};

// fused [s, b, (n + 2 m) d] -> q, k rotated by table [2, s, r / 2], v as it is.
template <class T>
void rope(const T* fused, const T* cos, const T* sin, Heads<T> q, Heads<T> k, Heads<T> v, HeadShape shape, int threads);

// The gradients of q, k (rotated back) and v -> that of fused.
template <class T>
void rope_backward(Heads<const T> q, Heads<const T> k, Heads<const T> v, const T* cos, const T* sin, T* fused,
                   HeadShape shape, int threads);

// Causal attention of float32 heads, softmax over scale * q k; out [s, b, n * d], lse [b, n, s]: log of the sums. shape.r
// is not used. begin [b, s] (may be null: zeros): row i sees columns begin[i] .. i; non-decreasing along a sample.
// Needs AVX2: attention_runs says whether it is there.
bool attention_runs();
void attention(Heads<const float> q, Heads<const float> k, Heads<const float> v, const int64_t* begin, float* out,
               float* lse, HeadShape shape, double scale, int threads);
// grad: that of out, as heads.
void attention_backward(Heads<const float> grad, Heads<const float> q, Heads<const float> k, Heads<const float> v,
                        const int64_t* begin, const float* out, const float* lse, Heads<float> gq, Heads<float> gk,
                        Heads<float> gv, HeadShape shape, double scale, int threads);

// Rows of v logits, the first `valid` of which count: stats[0][row] = max, [1] = sum exp(x - max), [2] = x[target].
// target < 0 or >= valid: it lies with another rank, and [2] is 0.
template <class T>
void softmax_stats(const T* logits, const int64_t* target, Wide<T>* stats, int64_t rows, int64_t v, int64_t valid,
                   int threads);

// logits <- exp(x - peak) * scale - [column == target] * grad, in place; columns from `valid` on become 0.
template <class T>
void softmax_gradient(T* logits, const int64_t* target, const Wide<T>* peak, const Wide<T>* scale, const Wide<T>* grad,
                      int64_t rows, int64_t v, int64_t valid, int threads);

struct AdamW {
    double lr, beta1, beta2, eps, weight_decay, scale;  // scale: of the gradient
    int64_t step;                                       // counts from 1
};

// One pass over n values: moments and masters updated, values (if not null, another type) rounded from the masters.
template <class W, class T>
void adamw(W* master, const W* grad, W* m, W* v, T* values, int64_t n, AdamW how, int threads);

// out[i]: the sum of squares of x[bounds[2 i]] .. x[bounds[2 i + 1]), for k ranges of the n values, added in double in an
// order that depends on a range's length only.
template <class T>
void sum_squares(const T* x, int64_t n, const int64_t* bounds, double* out, int64_t k, int threads);

}  // namespace trident
