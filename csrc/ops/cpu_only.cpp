// GEMM and attention in float32, CPU only (see ops.h); on other devices torch's libraries compute them.

#include "ops/ops.h"

#include <ATen/ops/zeros.h>

#include "kernels/cpu/gemm.h"

namespace trident::ops {

namespace {

Matrix matrix(const Tensor& x, const char* name) {
    const int64_t row = x.stride(0), col = x.stride(1);
    const bool thin = x.size(0) <= 1 || x.size(1) <= 1;
    require(row == 1 || col == 1 || thin, "mm_", std::string(name) + " has no dimension of stride 1");
    require(row >= 0 && col >= 0, "mm_", std::string(name) + " has a negative stride");
    // For a single row or column, packing needs stride 1 along the other dimension.
    return {data<float>(x), x.size(0) <= 1 && col != 1 ? 1 : row, x.size(1) <= 1 && row != 1 ? 1 : col};
}

AttentionShape require_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& begin,
                                 const char* op) {
    require_heads(q, k, v, op, true);
    const int64_t b = q.size(0), n = q.size(1), s = q.size(2), d = q.size(3), m = k.size(1), keys = k.size(2);
    require(s <= keys, op, "q has " + std::to_string(s) + " positions, k " + std::to_string(keys));
    require_type(q.scalar_type() == at::kFloat, op, std::string("expected float32, got ") + toString(q.scalar_type()));
    require(m > 0 && n % m == 0, op, "q has " + std::to_string(n) + " heads, k " + std::to_string(m));
    if (begin) {
        require_typed(*begin, at::kLong, {b, s}, q, op, "begin");
        const int64_t* first = data<int64_t>(*begin);
        for (int64_t i = 0; i < b * s; i++)
            require(first[i] >= (i % s ? first[i - 1] : 0) && first[i] <= keys - s + i % s, op,
                    "begin[" + std::to_string(i / s) + ", " + std::to_string(i % s) + "] is " +
                        std::to_string(first[i]) +
                        ": expected at least the previous one (or 0) and at most its own position");
    }
    require(trident::attention_runs(), op, "this processor has no AVX2");
    return {s, keys, b, n, m, d};
}

WeightDropout require_dropout(const Optional& places, int64_t key, int64_t stream, int64_t threshold, double scale,
                              const Tensor& q, const char* op) {
    if (places) require_places(*places, {q.size(0), q.size(1), q.size(2)}, q, op, "places");
    return {data<int64_t>(places), key_of(key, stream), require_threshold(threshold, op), float(scale)};
}

}  // namespace

void mm_(Tensor& out, const Tensor& a, const Tensor& b, bool add) {
    const char* op = "mm_";
    for (const auto& [x, name] : {std::pair{&std::as_const(out), "out"}, {&a, "a"}, {&b, "b"}}) {
        require_device(*x, op, name);
        require(x->dim() == 2, op, std::string(name) + " " + shape(*x) + " is not a matrix");
        require_type(x->scalar_type() == at::kFloat, op,
                     std::string("expected float32, got ") + toString(x->scalar_type()));
    }
    require(a.size(1) == b.size(0) && out.size(0) == a.size(0) && out.size(1) == b.size(1), op,
            shape(a) + " times " + shape(b) + " into " + shape(out));
    require(out.size(1) <= 1 || out.stride(1) == 1, op, "rows of the result must be contiguous");
    require(trident::sgemm_runs(), op, "this processor has no AVX2");
    trident::sgemm(out.size(0), out.size(1), a.size(1), matrix(a, "a"), matrix(b, "b"), data<float>(out), out.stride(0),
                   add, threads());
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& begin,
                                     double scale, const Optional& places, int64_t key, int64_t stream,
                                     int64_t threshold, double keep_scale) {
    const AttentionShape x = require_attention(q, k, v, begin, "attention");
    const WeightDropout dropout = require_dropout(places, key, stream, threshold, keep_scale, q, "attention");
    Tensor out = at::empty({x.s, x.b, x.n * x.d}, q.options()), lse = at::empty({x.b, x.n, x.s}, q.options());
    if (out.numel() > 0)
        trident::attention(heads<const float, float>(q), heads<const float, float>(k), heads<const float, float>(v),
                           data<int64_t>(begin), data<float>(out), data<float>(lse), x, scale, dropout, threads());
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      const Optional& begin, double scale, const Optional& places,
                                                      int64_t key, int64_t stream, int64_t threshold,
                                                      double keep_scale) {
    const char* op = "attention_backward";
    const AttentionShape x = require_attention(q, k, v, begin, op);
    const WeightDropout dropout = require_dropout(places, key, stream, threshold, keep_scale, q, op);
    require_like(grad, {x.s, x.b, x.n * x.d}, q, op, "grad");
    require_like(out, {x.s, x.b, x.n * x.d}, q, op, "out");
    require_like(lse, {x.b, x.n, x.s}, q, op, "lse");
    Tensor gq = at::empty({x.b, x.n, x.s, x.d}, q.options());
    // zeros: without queries the kernel does not run
    Tensor gk = at::zeros({x.b, x.m, x.keys, x.d}, q.options()), gv = at::zeros({x.b, x.m, x.keys, x.d}, q.options());
    const Heads<const float> g{data<float>(grad), x.n * x.d, x.d, x.b * x.n * x.d};
    if (out.numel() > 0)
        trident::attention_backward(g, heads<const float, float>(q), heads<const float, float>(k),
                                    heads<const float, float>(v), data<int64_t>(begin), data<float>(out),
                                    data<float>(lse), heads<float, float>(gq), heads<float, float>(gk),
                                    heads<float, float>(gv), x, scale, dropout, threads());
    return {gq, gk, gv};
}

}  // namespace trident::ops
