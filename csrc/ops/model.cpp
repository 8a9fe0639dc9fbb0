// Gated activations, RoPE fused with the change of layout, cross entropy (see ops.h).

#include "ops/ops.h"

namespace trident::ops {

namespace {

std::vector<int64_t> require_gated(const Tensor& fused, int64_t kind, const char* op) {
    require_plain(fused, op, "fused");
    require(fused.dim() >= 1 && fused.size(-1) % 2 == 0, op, "fused " + shape(fused) + " is not gate | up");
    require(kind >= 0 && kind < KINDS, op,
            "kind is " + std::to_string(kind) + ", expected 0 silu, 1 gelu or 2 gelu by tanh");
    std::vector<int64_t> sizes = fused.sizes().vec();
    sizes.back() /= 2;
    return sizes;
}

void require_table(const Tensor& table, const Tensor& x, int64_t s, int64_t d, const char* op) {
    require(table.dim() == 3 && table.size(0) == 2 && table.size(1) == s && 2 * table.size(2) <= d, op,
            "table is " + shape(table) + ", expected [2, " + std::to_string(s) + ", at most " + std::to_string(d / 2) +
                "]");
    require_like(table, {2, s, table.size(2)}, x, op, "table");
}

void require_targets(const Tensor& logits, const Tensor& target, int64_t valid, const char* op) {
    require_plain(logits, op, "logits");
    require(logits.dim() == 2, op, "logits " + shape(logits) + " are not [n, v]");
    require_typed(target, at::kLong, {logits.size(0)}, logits, op, "target");
    require(valid >= 0 && valid <= logits.size(1), op, "valid is " + std::to_string(valid) + " of " + shape(logits));
}

}  // namespace

// ---- gated activations

Tensor gated(const Tensor& fused, int64_t kind) {
    const char* op = "gated";
    Tensor y = at::empty(require_gated(fused, kind, op), fused.options());
    dispatch(fused, op, [&](auto tag, const auto& where) {
        using T = TYPE_OF(tag);
        const int64_t f = y.size(-1);
        trident::gated<T>(data<T>(fused), data<T>(y), int(kind), rows_of(y, f), f, where);
    });
    return y;
}

Tensor gated_backward(const Tensor& grad, const Tensor& fused, int64_t kind) {
    const char* op = "gated_backward";
    require_like(grad, require_gated(fused, kind, op), fused, op, "grad");
    Tensor out = at::empty_like(fused);
    dispatch(fused, op, [&](auto tag, const auto& where) {
        using T = TYPE_OF(tag);
        const int64_t f = grad.size(-1);
        trident::gated_backward<T>(data<T>(grad), data<T>(fused), data<T>(out), int(kind), rows_of(grad, f), f, where);
    });
    return out;
}

// ---- RoPE

std::tuple<Tensor, Tensor, Tensor> rope(const Tensor& fused, const Tensor& table, int64_t n, int64_t m) {
    const char* op = "rope";
    require_plain(fused, op, "fused");
    require(fused.dim() == 3 && n > 0 && m > 0 && fused.size(2) % (n + 2 * m) == 0, op,
            "fused " + shape(fused) + " is not [s, b, (n + 2 m) d] for n = " + std::to_string(n) +
                ", m = " + std::to_string(m));
    const int64_t s = fused.size(0), b = fused.size(1), d = fused.size(2) / (n + 2 * m);
    require_table(table, fused, s, d, op);
    const int64_t half = table.size(2);
    Tensor q = at::empty({b, n, s, d}, fused.options()), k = at::empty({b, m, s, d}, fused.options());
    Tensor v = at::empty({b, m, s, d}, fused.options());
    dispatch(fused, op, [&](auto tag, const auto& where) {
        using T = TYPE_OF(tag);
        trident::rope<T>(data<T>(fused), data<T>(table), data<T>(table) + s * half, heads<T, T>(q), heads<T, T>(k),
                         heads<T, T>(v), {s, b, n, m, d, 2 * half}, where);
    });
    return {q, k, v};
}

// The gradients may have any strides, except along d, where it must be 1.
Tensor rope_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table) {
    const char* op = "rope_backward";
    require_heads(q, k, v, op);
    const int64_t b = q.size(0), n = q.size(1), s = q.size(2), d = q.size(3), m = k.size(1);
    require_table(table, q, s, d, op);
    const int64_t half = table.size(2);
    Tensor out = at::empty({s, b, (n + 2 * m) * d}, q.options());
    dispatch(q, op, [&](auto tag, const auto& where) {
        using T = TYPE_OF(tag);
        trident::rope_backward<T>(heads<const T, T>(q), heads<const T, T>(k), heads<const T, T>(v), data<T>(table),
                                  data<T>(table) + s * half, data<T>(out), {s, b, n, m, d, 2 * half}, where);
    });
    return out;
}

// ---- cross entropy

Tensor softmax_stats(const Tensor& logits, const Tensor& target, int64_t valid) {
    const char* op = "softmax_stats";
    require_targets(logits, target, valid, op);
    Tensor stats = at::empty({3, logits.size(0)}, logits.options().dtype(wide(logits.scalar_type())));
    dispatch(logits, op, [&](auto tag, const auto& where) {
        using T = TYPE_OF(tag);
        trident::softmax_stats<T>(data<T>(logits), data<int64_t>(target), data<Wide<T>>(stats), logits.size(0),
                                  logits.size(1), valid, where);
    });
    return stats;
}

void softmax_gradient_(Tensor& logits, const Tensor& target, const Tensor& peak, const Tensor& scale,
                       const Tensor& grad, int64_t valid) {
    const char* op = "softmax_gradient_";
    require_targets(logits, target, valid, op);
    const auto type = wide(logits.scalar_type());
    require_typed(peak, type, {logits.size(0)}, logits, op, "peak");
    require_typed(scale, type, {logits.size(0)}, logits, op, "scale");
    require_typed(grad, type, {logits.size(0)}, logits, op, "grad");
    dispatch(logits, op, [&](auto tag, const auto& where) {
        using T = TYPE_OF(tag);
        using W = Wide<T>;
        trident::softmax_gradient<T>(data<T>(logits), data<int64_t>(target), data<W>(peak), data<W>(scale),
                                     data<W>(grad), logits.size(0), logits.size(1), valid, where);
    });
}

}  // namespace trident::ops
