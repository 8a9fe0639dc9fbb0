// The CPU kernels behind the operators of ops/, on raw pointers, without torch. Rows are computed independently of each
// other.
//
// T: the type of activations, float, double, bf16 or f16. Wide<T>: the type of computation, double for double, else
// float.
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

// y = x s w for rows of h values, where s = scale[row] = 1 / sqrt(mean(x^2) + eps). With offset 0, x s is rounded to T
// and then multiplied by w; otherwise x s is multiplied by offset + w and rounded once. If residual is not null, sum =
// x + residual, rounded to T, is written and normalised instead of x.
template <class T>
void rms_norm(const T* x, const T* residual, T* sum, const T* w, T* y, Wide<T>* scale, int64_t rows, int64_t h,
              double eps, double offset, int threads);

// gx: the gradient of x (or of the sum, if there was a residual). gw[h]: summed over the rows in an order that depends
// only on the number of rows. grad_sum (may be null): the gradient of x from outside the norm (residual path), added to
// gx.
template <class T>
void rms_norm_backward(const T* grad, const T* grad_sum, const T* x, const T* w, const Wide<T>* scale, T* gx, T* gw,
                       int64_t rows, int64_t h, double offset, int threads);

// LayerNorm: y = (x - mean) s w + b with s = 1 / sqrt(variance + eps); stats[0][row] = mean, stats[1][row] = s.
template <class T>
void layer_norm(const T* x, const T* residual, T* sum, const T* w, const T* b, T* y, Wide<T>* stats, int64_t rows,
                int64_t h, double eps, int threads);
template <class T>
void layer_norm_backward(const T* grad, const T* grad_sum, const T* x, const T* w, const Wide<T>* stats, T* gx, T* gw,
                         T* gb, int64_t rows, int64_t h, int threads);

// Activation of the gate: x sigmoid(x); x times the standard normal CDF at x; the tanh approximation of the latter.
enum Kind : int { SILU, GELU, GELU_TANH, KINDS };

// Gated activation: rows of 2 f values, gate | up -> rows of f values, act(gate) * up.
template <class T>
void gated(const T* fused, T* y, int kind, int64_t rows, int64_t f, int threads);
template <class T>
void gated_backward(const T* grad, const T* fused, T* gfused, int kind, int64_t rows, int64_t f, int threads);

// Sizes of a fused q|k|v: s positions, b samples, n query and m KV heads of d values, the first r of which are rotated.
struct HeadShape {
    int64_t s, b, n, m, d, r;
};

// A tensor [b, heads, s, d] with stride 1 along d.
template <class T>
struct Heads {
    T* p;
    int64_t sample, head, position;
};

// fused [s, b, (n + 2 m) d] -> q and k, rotated by cos and sin [s, r / 2], and v, unchanged.
template <class T>
void rope(const T* fused, const T* cos, const T* sin, Heads<T> q, Heads<T> k, Heads<T> v, HeadShape shape, int threads);

// The gradients of q, k and v -> the gradient of fused; those of q and k are rotated back.
template <class T>
void rope_backward(Heads<const T> q, Heads<const T> k, Heads<const T> v, const T* cos, const T* sin, T* fused,
                   HeadShape shape, int threads);

// The words of a key and a stream: key is Philox's key, stream the upper half of its counter.
struct DrawKey {
    uint64_t key, stream;
};

// Sizes of attention: the s queries are the last of `keys` positions; b samples, n query and m KV heads of d values.
struct AttentionShape {
    int64_t s, keys, b, n, m, d;
};

// Dropout of attention weights. places [b, n, s]: of each query's weight for key 0 (null: no dropout); a weight whose word
// (see draws.h) is below threshold becomes 0, the others are multiplied by scale.
struct WeightDropout {
    const int64_t* places;
    DrawKey key;
    uint32_t threshold;
    float scale;
};

// Causal attention of float32 heads, softmax over scale * q k. out [s, b, n * d]; lse [b, n, s]: log-sum-exp of the
// scores. begin [b, s] (null: all zeros): query i, at position p = keys - s + i, attends to keys begin[i] .. p;
// non-decreasing along a sample. Needs AVX2: attention_runs returns whether the processor has it.
bool attention_runs();
void attention(Heads<const float> q, Heads<const float> k, Heads<const float> v, const int64_t* begin, float* out,
               float* lse, AttentionShape shape, double scale, WeightDropout dropout, int threads);
// grad: the gradient of out, as heads.
void attention_backward(Heads<const float> grad, Heads<const float> q, Heads<const float> k, Heads<const float> v,
                        const int64_t* begin, const float* out, const float* lse, Heads<float> gq, Heads<float> gk,
                        Heads<float> gv, AttentionShape shape, double scale, WeightDropout dropout, int threads);

// For rows of v logits, over the first `valid` columns: stats[0][row] = max, [1] = sum exp(x - max), [2] = x[target].
// If target < 0 or >= valid, another rank has the target's logit, and [2] is 0.
template <class T>
void softmax_stats(const T* logits, const int64_t* target, Wide<T>* stats, int64_t rows, int64_t v, int64_t valid,
                   int threads);

// In place: logits <- exp(x - peak) * scale - (column == target ? grad : 0); columns from `valid` on become 0.
template <class T>
void softmax_gradient(T* logits, const int64_t* target, const Wide<T>* peak, const Wide<T>* scale, const Wide<T>* grad,
                      int64_t rows, int64_t v, int64_t valid, int threads);

struct AdamW {
    double lr, beta1, beta2, eps, weight_decay, scale;  // scale: of the gradient
    int64_t step;                                       // counts from 1
};

// AdamW in one pass over n values: updates moments and master weights; values (if not null) are the rounded masters.
template <class W, class T>
void adamw(W* master, const W* grad, W* m, W* v, T* values, int64_t n, AdamW how, int threads);

// out[i]: the sum of squares of the range [bounds[2 i], bounds[2 i + 1]) of x, for k ranges of the n values. Added in
// double, in an order that depends only on the length of a range.
template <class T>
void sum_squares(const T* x, int64_t n, const int64_t* bounds, double* out, int64_t k, int threads);

// ---- keyed draws: Philox4x32-10, see draws.h

// What a draw is: a uint32; a float32 in [0, 1); a standard normal float32; whether its word is at least a threshold
// (a bool). The numbers in engine/ops/draws.py.
enum Draw : int { BITS, UNIFORM, NORMAL, KEEP, DRAWS };

// out[r][i], for rows of n elements: the draw of the element at place starts[r] + i, which depends on key, kind and place
// alone. Places are not negative. out: uint32_t, float or bool, according to kind.
void draw(const int64_t* starts, int64_t rows, int64_t n, DrawKey key, int kind, uint32_t threshold, void* out,
          int threads);

// y = x * scale, rounded to T, where KEEP is true, else 0. Places as for `draw`. In place if y is x.
template <class T>
void dropout(const T* x, const int64_t* starts, int64_t rows, int64_t n, DrawKey key, uint32_t threshold, double scale,
             T* y, int threads);

}  // namespace trident
