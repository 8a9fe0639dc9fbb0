// RMSNorm and LayerNorm, with or without the residual addition before them (see ops.h).

#include "ops/ops.h"

namespace trident::ops {

namespace {

// Checks x [.., h], and that the vectors are [h] and of x's type; returns h.
int64_t require_rows(const Tensor& x, std::initializer_list<std::pair<const Tensor*, const char*>> vectors,
                     const char* op) {
    require(x.dim() >= 1, op, "x has no dimension");
    require_plain(x, op, "x");
    const int64_t h = x.size(-1);
    for (const auto& [vector, name] : vectors) require_like(*vector, {h}, x, op, name);
    return h;
}

// For a backward: checks the gradients, and the tensor that the forward saved: its name and sizes.
void require_gradients(const Tensor& grad, const Optional& grad_sum, const Tensor& x, const Tensor& saved,
                       at::IntArrayRef sizes, const char* op, const char* name) {
    require_like(grad, x.sizes(), x, op, "grad");
    if (grad_sum) require_like(*grad_sum, x.sizes(), x, op, "grad_sum");
    require_typed(saved, wide(x.scalar_type()), sizes, x, op, name);
}

std::tuple<Tensor, Tensor> rms(const Tensor& x, const Tensor* residual, const Tensor& sum, const Tensor& weight,
                               double eps, double offset, const char* op) {
    const int64_t h = require_rows(x, {{&weight, "weight"}}, op);
    if (residual) require_like(*residual, x.sizes(), x, op, "residual");
    Tensor y = at::empty_like(x), scale = at::empty({rows_of(x, h)}, x.options().dtype(wide(x.scalar_type())));
    dispatch(x, op, [&](auto tag, const auto& where) {
        using T = TYPE_OF(tag);
        trident::rms_norm<T>(data<T>(x), residual ? data<T>(*residual) : nullptr, residual ? data<T>(sum) : nullptr,
                             data<T>(weight), data<T>(y), data<Wide<T>>(scale), scale.numel(), h, eps, offset, where);
    });
    return {y, scale};
}

std::tuple<Tensor, Tensor> layer(const Tensor& x, const Tensor* residual, const Tensor& sum, const Tensor& weight,
                                 const Tensor& bias, double eps, const char* op) {
    const int64_t h = require_rows(x, {{&weight, "weight"}, {&bias, "bias"}}, op);
    if (residual) require_like(*residual, x.sizes(), x, op, "residual");
    Tensor y = at::empty_like(x), stats = at::empty({2, rows_of(x, h)}, x.options().dtype(wide(x.scalar_type())));
    dispatch(x, op, [&](auto tag, const auto& where) {
        using T = TYPE_OF(tag);
        trident::layer_norm<T>(data<T>(x), residual ? data<T>(*residual) : nullptr, residual ? data<T>(sum) : nullptr,
                               data<T>(weight), data<T>(bias), data<T>(y), data<Wide<T>>(stats), stats.size(1), h, eps,
                               where);
    });
    return {y, stats};
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
    return rms(x, nullptr, x, weight, eps, offset, "rms_norm");
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                double eps, double offset) {
    Tensor sum = at::empty_like(x);
    auto [y, scale] = rms(x, &residual, sum, weight, eps, offset, "add_rms_norm");
    return {sum, y, scale};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Optional& grad_sum, const Tensor& x,
                                             const Tensor& weight, const Tensor& scale, double offset) {
    const char* op = "rms_norm_backward";
    const int64_t h = require_rows(x, {{&weight, "weight"}}, op), rows = rows_of(x, h);
    require_gradients(grad, grad_sum, x, scale, {rows}, op, "scale");
    Tensor gx = at::empty_like(x), gw = at::empty_like(weight);
    dispatch(x, op, [&](auto tag, const auto& where) {
        using T = TYPE_OF(tag);
        trident::rms_norm_backward<T>(data<T>(grad), data<T>(grad_sum), data<T>(x), data<T>(weight),
                                      data<Wide<T>>(scale), data<T>(gx), data<T>(gw), rows, h, offset, where);
    });
    return {gx, gw};
}

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
    return layer(x, nullptr, x, weight, bias, eps, "layer_norm");
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                  const Tensor& bias, double eps) {
    Tensor sum = at::empty_like(x);
    auto [y, stats] = layer(x, &residual, sum, weight, bias, eps, "add_layer_norm");
    return {sum, y, stats};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Optional& grad_sum, const Tensor& x,
                                                       const Tensor& weight, const Tensor& stats) {
    const char* op = "layer_norm_backward";
    const int64_t h = require_rows(x, {{&weight, "weight"}}, op), rows = rows_of(x, h);
    require_gradients(grad, grad_sum, x, stats, {2, rows}, op, "stats");
    Tensor gx = at::empty_like(x), gw = at::empty_like(weight), gb = at::empty_like(weight);
    dispatch(x, op, [&](auto tag, const auto& where) {
        using T = TYPE_OF(tag);
        trident::layer_norm_backward<T>(data<T>(grad), data<T>(grad_sum), data<T>(x), data<T>(weight),
                                        data<Wide<T>>(stats), data<T>(gx), data<T>(gw), data<T>(gb), rows, h, where);
    });
    return {gx, gw, gb};
}

}  // namespace trident::ops
