// Shared by all operators: argument checks that raise Python errors with the operator's name, and the conversion of
// tensors to the arguments of the kernels in kernels.h. Below, all operators are declared; schemas.cpp has their
// schemas.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernels/kernels.h"
#include "ops/where.h"

namespace trident::ops {

using at::Tensor;
using Optional = std::optional<Tensor>;

inline void require(bool condition, const char* op, const std::string& problem) {
    TORCH_CHECK_VALUE(condition, "trident::", op, ": ", problem);
}

inline void require_type(bool condition, const char* op, const std::string& problem) {
    TORCH_CHECK_TYPE(condition, "trident::", op, ": ", problem);
}

inline std::string shape(at::IntArrayRef sizes) {
    std::string text = "[";
    for (size_t i = 0; i < sizes.size(); i++) text += (i ? ", " : "") + std::to_string(sizes[i]);
    return text + "]";
}

inline std::string shape(const Tensor& x) { return shape(x.sizes()); }

// x is on a device that the kernels run on.
inline void require_device(const Tensor& x, const char* op, const char* name) {
    require(x.is_cpu() || on_gpu(x.device()), op,
            std::string(name) + " is on " + x.device().str() + ", expected " + DEVICES);
}

inline void require_plain(const Tensor& x, const char* op, const char* name) {
    require_device(x, op, name);
    require(x.is_contiguous(), op, std::string(name) + " " + shape(x) + " is not contiguous");
}

inline void require_shape(const Tensor& x, at::IntArrayRef sizes, const char* op, const char* name) {
    if (x.sizes() != sizes) require(false, op, std::string(name) + " is " + shape(x) + ", expected " + shape(sizes));
}

// x is contiguous, has this type and these sizes, and is on the device of `like`.
inline void require_typed(const Tensor& x, at::ScalarType type, at::IntArrayRef sizes, const Tensor& like,
                          const char* op, const char* name) {
    require_plain(x, op, name);
    require(x.device() == like.device(), op,
            std::string(name) + " is on " + x.device().str() + ", the others on " + like.device().str());
    require_type(x.scalar_type() == type, op,
                 std::string(name) + " is " + toString(x.scalar_type()) + ", expected " + toString(type));
    require_shape(x, sizes, op, name);
}

inline void require_like(const Tensor& x, at::IntArrayRef sizes, const Tensor& like, const char* op, const char* name) {
    require_typed(x, like.scalar_type(), sizes, like, op, name);
}

inline at::ScalarType wide(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

// Calls f(tag, where). tag: a null pointer to the kernels' C++ type for x's dtype. where: from on_device.
template <class F>
void dispatch(const Tensor& x, const char* op, F f) {
    on_device(x, [&](const auto& where) {
        switch (x.scalar_type()) {
            case at::kFloat: return f(static_cast<float*>(nullptr), where);
            case at::kDouble: return f(static_cast<double*>(nullptr), where);
            case at::kBFloat16: return f(static_cast<bf16*>(nullptr), where);
            case at::kHalf: return f(static_cast<f16*>(nullptr), where);
            default:
                require_type(false, op,
                             std::string("expected floating-point tensors, got ") + toString(x.scalar_type()));
        }
    });
}

#define TYPE_OF(tag) std::remove_pointer_t<decltype(tag)>

template <class T>
T* data(const Tensor& x) {
    return static_cast<T*>(x.data_ptr());
}

template <class T>
T* data(const Optional& x) {
    return x ? data<T>(*x) : nullptr;
}

// A tensor [b, heads, s, d] of P, as the kernels' view of T.
template <class T, class P>
Heads<T> heads(const Tensor& x) {
    return {data<P>(x), x.stride(0), x.stride(1), x.stride(2)};
}

// q, k, v are [b, heads, s, d] of one type on one device, with stride 1 along d; k and v have the same shape, and the
// number of positions of q unless `any_keys`.
inline void require_heads(const Tensor& q, const Tensor& k, const Tensor& v, const char* op, bool any_keys = false) {
    require(q.dim() == 4 && k.dim() == 4, op, "expected [b, heads, s, d], got " + shape(q) + " and " + shape(k));
    for (const auto& [x, name] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}}) {
        require_device(*x, op, name);
        require(x->device() == q.device(), op, "q, k and v are on different devices");
        require_type(x->scalar_type() == q.scalar_type(), op, "q, k and v have different types");
        const int64_t positions = (any_keys && x != &q ? k : q).size(2);
        require_shape(*x, {q.size(0), (x == &q ? q : k).size(1), positions, q.size(3)}, op, name);
        require(q.size(3) <= 1 || x->stride(3) == 1, op, std::string(name) + " has no stride of 1 along d");
    }
}

inline int64_t rows_of(const Tensor& x, int64_t width) { return width ? x.numel() / width : 0; }

// ---- norm.cpp

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset);
std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                double eps, double offset);
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Optional& grad_sum, const Tensor& x,
                                             const Tensor& weight, const Tensor& scale, double offset);
std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps);
std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                  const Tensor& bias, double eps);
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Optional& grad_sum, const Tensor& x,
                                                       const Tensor& weight, const Tensor& stats);

// ---- model.cpp: gated activations, RoPE, cross entropy

Tensor gated(const Tensor& fused, int64_t kind);
Tensor gated_backward(const Tensor& grad, const Tensor& fused, int64_t kind);
std::tuple<Tensor, Tensor, Tensor> rope(const Tensor& fused, const Tensor& table, int64_t n, int64_t m);
Tensor rope_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table);
Tensor softmax_stats(const Tensor& logits, const Tensor& target, int64_t valid);
void softmax_gradient_(Tensor& logits, const Tensor& target, const Tensor& peak, const Tensor& scale,
                       const Tensor& grad, int64_t valid);

// ---- cpu_only.cpp: GEMM and attention; other devices have libraries for them

void mm_(Tensor& out, const Tensor& a, const Tensor& b, bool add);
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& begin,
                                     double scale, const Optional& places, int64_t key, int64_t stream,
                                     int64_t threshold, double keep_scale);
std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      const Optional& begin, double scale, const Optional& places,
                                                      int64_t key, int64_t stream, int64_t threshold,
                                                      double keep_scale);

// ---- optim.cpp

void adamw_(Tensor& master, const Tensor& grad, Tensor& exp_avg, Tensor& exp_avg_sq, const Optional& values, double lr,
            double beta1, double beta2, double eps, double weight_decay, double grad_scale, int64_t step);
Tensor sum_squares(const Tensor& flat, const Tensor& bounds);

// ---- draws.cpp: keyed draws, dropout

DrawKey key_of(int64_t key, int64_t stream);
uint32_t require_threshold(int64_t threshold, const char* op);
// Places: int64 of the shape, on like's device, not negative (checked on a CPU).
void require_places(const Tensor& places, at::IntArrayRef shape, const Tensor& like, const char* op, const char* name);

Tensor draw(const Tensor& starts, int64_t n, int64_t key, int64_t stream, int64_t kind, int64_t threshold);
Tensor dropout(const Tensor& x, const Tensor& starts, int64_t key, int64_t stream, int64_t threshold, double scale);

}  // namespace trident::ops
