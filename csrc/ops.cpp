// The operators `trident::*`: schemas, checks, and the way from tensors to the kernels of kernels.h and gemm.h.
//
// A wrong shape, type or device is a Python error with the operator's name, never a crash. Autograd and shape functions
// are registered in Python (engine/ops): the operators here compute and allocate, nothing else. All want contiguous
// tensors unless they say otherwise; callers make them so.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <string>
#include <tuple>

#include "gemm.h"
#include "kernels.h"

namespace {

using at::Tensor;

void want(bool holds, const char* op, const std::string& what) { TORCH_CHECK_VALUE(holds, "trident::", op, ": ", what); }

void want_type(bool holds, const char* op, const std::string& what) {
    TORCH_CHECK_TYPE(holds, "trident::", op, ": ", what);
}

std::string shape(const Tensor& x) {
    std::string text = "[";
    for (int64_t i = 0; i < x.dim(); i++) text += (i ? ", " : "") + std::to_string(x.size(i));
    return text + "]";
}

void want_plain(const Tensor& x, const char* op, const char* name) {
    want(x.device().is_cpu(), op, std::string(name) + " is on " + x.device().str() + ", wanted cpu");
    want(x.is_contiguous(), op, std::string(name) + " " + shape(x) + " is not contiguous");
}

void want_like(const Tensor& x, const Tensor& like, const char* op, const char* name) {
    want_plain(x, op, name);
    want_type(x.scalar_type() == like.scalar_type(), op,
              std::string(name) + " is " + toString(x.scalar_type()) + ", the others " + toString(like.scalar_type()));
}

void want_shape(const Tensor& x, at::IntArrayRef sizes, const char* op, const char* name) {
    if (x.sizes() == sizes) return;
    std::string text = "[";
    for (size_t i = 0; i < sizes.size(); i++) text += (i ? ", " : "") + std::to_string(sizes[i]);
    want(false, op, std::string(name) + " is " + shape(x) + ", wanted " + text + "]");
}

at::ScalarType wide(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

// Calls f with a null pointer of the kernels' own type for a tensor's type.
template <class F>
void dispatch(const Tensor& x, const char* op, F f) {
    switch (x.scalar_type()) {
        case at::kFloat: return f(static_cast<float*>(nullptr));
        case at::kDouble: return f(static_cast<double*>(nullptr));
        case at::kBFloat16: return f(static_cast<trident::bf16*>(nullptr));
        case at::kHalf: return f(static_cast<trident::f16*>(nullptr));
        default: want_type(false, op, std::string("wants floating-point tensors, got ") + toString(x.scalar_type()));
    }
}

#define TYPE_OF(tag) std::remove_pointer_t<decltype(tag)>

template <class T>
T* data(const Tensor& x) {
    return static_cast<T*>(x.data_ptr());
}

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

int64_t rows_of(const Tensor& x, int64_t width) { return width ? x.numel() / width : 0; }

// ---- matrix product

trident::Matrix matrix(const Tensor& x, const char* name) {
    const int64_t row = x.stride(0), col = x.stride(1);
    const bool thin = x.size(0) <= 1 || x.size(1) <= 1;
    want(row == 1 || col == 1 || thin, "mm_", std::string(name) + " has no dimension of stride 1");
    want(row >= 0 && col >= 0, "mm_", std::string(name) + " has a negative stride");
    // The packing wants stride 1 along the other dimension of a single row or column.
    return {x.data_ptr<float>(), x.size(0) <= 1 && col != 1 ? 1 : row, x.size(1) <= 1 && row != 1 ? 1 : col};
}

void mm_(Tensor& out, const Tensor& a, const Tensor& b, bool add) {
    for (const Tensor* x : {&std::as_const(out), &a, &b}) {
        want(x->device().is_cpu() && x->dim() == 2, "mm_", "wants matrices on the CPU, got " + shape(*x));
        want_type(x->scalar_type() == at::kFloat, "mm_", std::string("wants float32, got ") + toString(x->scalar_type()));
    }
    want(a.size(1) == b.size(0) && out.size(0) == a.size(0) && out.size(1) == b.size(1), "mm_",
         shape(a) + " times " + shape(b) + " into " + shape(out));
    want(out.size(1) <= 1 || out.stride(1) == 1, "mm_", "rows of the result must be contiguous");
    want(trident::sgemm_runs(), "mm_", "this processor has no AVX-512");
    trident::sgemm(out.size(0), out.size(1), a.size(1), matrix(a, "a"), matrix(b, "b"), out.data_ptr<float>(),
                   out.stride(0), add, threads());
}

// ---- RMSNorm

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    const char* op = "rms_norm";
    want(x.dim() >= 1, op, "x has no dimension");
    want_plain(x, op, "x");
    want_like(weight, x, op, "weight");
    const int64_t h = x.size(-1);
    want_shape(weight, {h}, op, "weight");
    Tensor y = at::empty_like(x), scale = at::empty({rows_of(x, h)}, x.options().dtype(wide(x.scalar_type())));
    dispatch(x, op, [&](auto tag) {
        using T = TYPE_OF(tag);
        trident::rms_norm<T>(data<T>(x), data<T>(weight), data<T>(y), data<trident::Wide<T>>(scale), scale.numel(), h, eps,
                             threads());
    });
    return {y, scale};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& scale) {
    const char* op = "rms_norm_backward";
    want(x.dim() >= 1, op, "x has no dimension");
    want_plain(x, op, "x");
    want_like(grad, x, op, "grad");
    want_shape(grad, x.sizes(), op, "grad");
    want_like(weight, x, op, "weight");
    const int64_t h = x.size(-1), rows = rows_of(x, h);
    want_shape(weight, {h}, op, "weight");
    want_plain(scale, op, "scale");
    want_shape(scale, {rows}, op, "scale");
    want_type(scale.scalar_type() == wide(x.scalar_type()), op, "scale is not what the forward gave");
    Tensor gx = at::empty_like(x), gw = at::empty_like(weight);
    dispatch(x, op, [&](auto tag) {
        using T = TYPE_OF(tag);
        trident::rms_norm_backward<T>(data<T>(grad), data<T>(x), data<T>(weight), data<trident::Wide<T>>(scale),
                                      data<T>(gx), data<T>(gw), rows, h, threads());
    });
    return {gx, gw};
}

// ---- SwiGLU

std::vector<int64_t> halved(const Tensor& fused, const char* op) {
    want(fused.dim() >= 1 && fused.size(-1) % 2 == 0, op, "fused " + shape(fused) + " is not gate | up");
    std::vector<int64_t> sizes = fused.sizes().vec();
    sizes.back() /= 2;
    return sizes;
}

Tensor swiglu(const Tensor& fused) {
    const char* op = "swiglu";
    want_plain(fused, op, "fused");
    Tensor y = at::empty(halved(fused, op), fused.options());
    dispatch(fused, op, [&](auto tag) {
        using T = TYPE_OF(tag);
        const int64_t f = y.size(-1);
        trident::swiglu<T>(data<T>(fused), data<T>(y), rows_of(y, f), f, threads());
    });
    return y;
}

Tensor swiglu_backward(const Tensor& grad, const Tensor& fused) {
    const char* op = "swiglu_backward";
    want_plain(fused, op, "fused");
    want_like(grad, fused, op, "grad");
    want_shape(grad, halved(fused, op), op, "grad");
    Tensor out = at::empty_like(fused);
    dispatch(fused, op, [&](auto tag) {
        using T = TYPE_OF(tag);
        const int64_t f = grad.size(-1);
        trident::swiglu_backward<T>(data<T>(grad), data<T>(fused), data<T>(out), rows_of(grad, f), f, threads());
    });
    return out;
}

// ---- RoPE with the change of layout

void want_table(const Tensor& table, const Tensor& x, int64_t s, int64_t d, const char* op) {
    want_like(table, x, op, "table");
    want(table.dim() == 3 && table.size(0) == 2 && table.size(1) == s && 2 * table.size(2) <= d, op,
         "table is " + shape(table) + ", wanted [2, " + std::to_string(s) + ", at most " + std::to_string(d / 2) + "]");
}

template <class T, class P>
trident::Heads<T> heads(const Tensor& x) {
    return {data<P>(x), x.stride(0), x.stride(1), x.stride(2)};
}

std::tuple<Tensor, Tensor, Tensor> rope(const Tensor& fused, const Tensor& table, int64_t n, int64_t m) {
    const char* op = "rope";
    want_plain(fused, op, "fused");
    want(fused.dim() == 3 && n > 0 && m > 0 && fused.size(2) % (n + 2 * m) == 0, op,
         "fused " + shape(fused) + " is not [s, b, (n + 2 m) d] for n = " + std::to_string(n) +
             ", m = " + std::to_string(m));
    const int64_t s = fused.size(0), b = fused.size(1), d = fused.size(2) / (n + 2 * m);
    want_table(table, fused, s, d, op);
    const int64_t half = table.size(2);
    Tensor q = at::empty({b, n, s, d}, fused.options()), k = at::empty({b, m, s, d}, fused.options());
    Tensor v = at::empty({b, m, s, d}, fused.options());
    dispatch(fused, op, [&](auto tag) {
        using T = TYPE_OF(tag);
        trident::rope<T>(data<T>(fused), data<T>(table), data<T>(table) + s * half, heads<T, T>(q), heads<T, T>(k),
                         heads<T, T>(v), {s, b, n, m, d, 2 * half}, threads());
    });
    return {q, k, v};
}

// The gradients may have any strides but along d.
Tensor rope_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table) {
    const char* op = "rope_backward";
    want(q.dim() == 4 && k.dim() == 4, op, "wants [b, heads, s, d], got " + shape(q) + " and " + shape(k));
    const int64_t b = q.size(0), n = q.size(1), s = q.size(2), d = q.size(3), m = k.size(1);
    want_shape(k, {b, m, s, d}, op, "k");
    want_shape(v, {b, m, s, d}, op, "v");
    for (const Tensor* x : {&q, &k, &v}) {
        want(x->device().is_cpu() && (d <= 1 || x->stride(3) == 1), op, "wants CPU tensors with stride 1 along d");
        want_type(x->scalar_type() == q.scalar_type(), op, "q, k and v have different types");
    }
    want_table(table, q, s, d, op);
    const int64_t half = table.size(2);
    Tensor out = at::empty({s, b, (n + 2 * m) * d}, q.options());
    dispatch(q, op, [&](auto tag) {
        using T = TYPE_OF(tag);
        trident::rope_backward<T>(heads<const T, T>(q), heads<const T, T>(k), heads<const T, T>(v), data<T>(table),
                                  data<T>(table) + s * half, data<T>(out), {s, b, n, m, d, 2 * half}, threads());
    });
    return out;
}

// ---- attention

trident::HeadShape want_heads(const Tensor& q, const Tensor& k, const Tensor& v, const char* op) {
    want(q.dim() == 4 && k.dim() == 4, op, "wants [b, heads, s, d], got " + shape(q) + " and " + shape(k));
    const int64_t b = q.size(0), n = q.size(1), s = q.size(2), d = q.size(3), m = k.size(1);
    want(m > 0 && n % m == 0, op, "q has " + std::to_string(n) + " heads, k " + std::to_string(m));
    want_shape(k, {b, m, s, d}, op, "k");
    want_shape(v, {b, m, s, d}, op, "v");
    for (const Tensor* x : {&q, &k, &v}) {
        want(x->device().is_cpu() && (d <= 1 || x->stride(3) == 1), op, "wants CPU tensors with stride 1 along d");
        want_type(x->scalar_type() == at::kFloat, op, std::string("wants float32, got ") + toString(x->scalar_type()));
    }
    want(trident::attention_runs(), op, "this processor has no AVX-512");
    return {s, b, n, m, d, 0};
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
    const trident::HeadShape x = want_heads(q, k, v, "attention");
    Tensor out = at::empty({x.s, x.b, x.n * x.d}, q.options()), lse = at::empty({x.b, x.n, x.s}, q.options());
    if (out.numel() > 0)
        trident::attention(heads<const float, float>(q), heads<const float, float>(k), heads<const float, float>(v),
                           data<float>(out), data<float>(lse), x, scale, threads());
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      double scale) {
    const char* op = "attention_backward";
    const trident::HeadShape x = want_heads(q, k, v, op);
    for (const Tensor* y : {&grad, &out}) {
        want_like(*y, q, op, "grad or out");
        want_shape(*y, {x.s, x.b, x.n * x.d}, op, "grad or out");
    }
    want_like(lse, q, op, "lse");
    want_shape(lse, {x.b, x.n, x.s}, op, "lse");
    Tensor gq = at::empty({x.b, x.n, x.s, x.d}, q.options()), gk = at::empty({x.b, x.m, x.s, x.d}, q.options());
    Tensor gv = at::empty({x.b, x.m, x.s, x.d}, q.options());
    const trident::Heads<const float> g{data<float>(grad), x.n * x.d, x.d, x.b * x.n * x.d};
    if (out.numel() > 0)
        trident::attention_backward(g, heads<const float, float>(q), heads<const float, float>(k),
                                    heads<const float, float>(v), data<float>(out), data<float>(lse),
                                    heads<float, float>(gq), heads<float, float>(gk), heads<float, float>(gv), x, scale,
                                    threads());
    return {gq, gk, gv};
}

bool attention_runs() { return trident::attention_runs(); }

// ---- cross entropy

void want_targets(const Tensor& logits, const Tensor& target, int64_t valid, const char* op) {
    want_plain(logits, op, "logits");
    want(logits.dim() == 2, op, "logits " + shape(logits) + " are not [n, v]");
    want_plain(target, op, "target");
    want_type(target.scalar_type() == at::kLong, op, std::string("target is ") + toString(target.scalar_type()));
    want_shape(target, {logits.size(0)}, op, "target");
    want(valid >= 0 && valid <= logits.size(1), op, "valid is " + std::to_string(valid) + " of " + shape(logits));
}

Tensor softmax_stats(const Tensor& logits, const Tensor& target, int64_t valid) {
    const char* op = "softmax_stats";
    want_targets(logits, target, valid, op);
    Tensor stats = at::empty({3, logits.size(0)}, logits.options().dtype(wide(logits.scalar_type())));
    dispatch(logits, op, [&](auto tag) {
        using T = TYPE_OF(tag);
        trident::softmax_stats<T>(data<T>(logits), data<int64_t>(target), data<trident::Wide<T>>(stats), logits.size(0),
                                  logits.size(1), valid, threads());
    });
    return stats;
}

void softmax_gradient_(Tensor& logits, const Tensor& target, const Tensor& peak, const Tensor& scale, const Tensor& grad,
                       int64_t valid) {
    const char* op = "softmax_gradient_";
    want_targets(logits, target, valid, op);
    for (const Tensor* x : {&peak, &scale, &grad}) {
        want_plain(*x, op, "peak, scale or grad");
        want_shape(*x, {logits.size(0)}, op, "peak, scale or grad");
        want_type(x->scalar_type() == wide(logits.scalar_type()), op, "peak, scale and grad are not float32 or wider");
    }
    dispatch(logits, op, [&](auto tag) {
        using T = TYPE_OF(tag);
        using W = trident::Wide<T>;
        trident::softmax_gradient<T>(data<T>(logits), data<int64_t>(target), data<W>(peak), data<W>(scale), data<W>(grad),
                                     logits.size(0), logits.size(1), valid, threads());
    });
}

// ---- AdamW

void adamw_(Tensor& master, const Tensor& grad, Tensor& exp_avg, Tensor& exp_avg_sq, const std::optional<Tensor>& values,
            double lr, double beta1, double beta2, double eps, double weight_decay, double grad_scale, int64_t step) {
    const char* op = "adamw_";
    want_plain(master, op, "master");
    want_like(grad, master, op, "grad");
    want_like(exp_avg, master, op, "exp_avg");
    want_like(exp_avg_sq, master, op, "exp_avg_sq");
    for (const Tensor* x : {&grad, &std::as_const(exp_avg), &std::as_const(exp_avg_sq)})
        want_shape(*x, master.sizes(), op, "grad or a moment");
    want(step >= 1, op, "step counts from 1");
    const trident::AdamW how{lr, beta1, beta2, eps, weight_decay, grad_scale, step};
    const int64_t n = master.numel();
    if (values) {
        want_plain(*values, op, "values");
        want_shape(*values, master.sizes(), op, "values");
    }
    if (master.scalar_type() == at::kDouble) {
        want_type(!values, op, "values are for float32 masters");
        trident::adamw<double, double>(data<double>(master), data<double>(grad), data<double>(exp_avg),
                                       data<double>(exp_avg_sq), nullptr, n, how, threads());
        return;
    }
    want_type(master.scalar_type() == at::kFloat, op, std::string("masters are ") + toString(master.scalar_type()));
    float *p = data<float>(master), *g = data<float>(grad), *m = data<float>(exp_avg), *v = data<float>(exp_avg_sq);
    if (!values)
        trident::adamw<float, float>(p, g, m, v, nullptr, n, how, threads());
    else if (values->scalar_type() == at::kBFloat16)
        trident::adamw<float, trident::bf16>(p, g, m, v, data<trident::bf16>(*values), n, how, threads());
    else if (values->scalar_type() == at::kHalf)
        trident::adamw<float, trident::f16>(p, g, m, v, data<trident::f16>(*values), n, how, threads());
    else
        want_type(false, op, std::string("values are ") + toString(values->scalar_type()) + ", wanted bfloat16 or float16");
}

// ---- what this library is, and what it asks of the C library

std::string built_for() { return BUILT_FOR; }

bool gemm_wins() { return trident::sgemm_wins(); }

// Keeps freed memory for the next step instead of giving each large tensor's pages back and faulting them in again.
bool keep_freed_memory() {
#if defined(__GLIBC__)
    return mallopt(M_MMAP_THRESHOLD, 1 << 30) && mallopt(M_TRIM_THRESHOLD, 0x7fffffff) && mallopt(M_TOP_PAD, 1 << 26);
#else
    return false;
#endif
}

}  // namespace

TORCH_LIBRARY(trident, lib) {
    lib.def("built_for() -> str", built_for);
    lib.def("gemm_wins() -> bool", gemm_wins);
    lib.def("keep_freed_memory() -> bool", keep_freed_memory);
    lib.def("mm_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()");
    lib.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
    lib.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)");
    lib.def("swiglu(Tensor fused) -> Tensor");
    lib.def("swiglu_backward(Tensor grad, Tensor fused) -> Tensor");
    lib.def("rope(Tensor fused, Tensor table, int n, int m) -> (Tensor, Tensor, Tensor)");
    lib.def("rope_backward(Tensor q, Tensor k, Tensor v, Tensor table) -> Tensor");
    lib.def("attention_runs() -> bool", attention_runs);
    lib.def("attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)");
    lib.def(
        "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale) -> "
        "(Tensor, Tensor, Tensor)");
    lib.def("softmax_stats(Tensor logits, Tensor target, int valid) -> Tensor");
    lib.def("softmax_gradient_(Tensor(a!) logits, Tensor target, Tensor peak, Tensor scale, Tensor grad, int valid) -> ()");
    lib.def(
        "adamw_(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? values, float lr, "
        "float beta1, float beta2, float eps, float weight_decay, float grad_scale, int step) -> ()");
}

TORCH_LIBRARY_IMPL(trident, CPU, lib) {
    lib.impl("mm_", mm_);
    lib.impl("rms_norm", rms_norm);
    lib.impl("rms_norm_backward", rms_norm_backward);
    lib.impl("swiglu", swiglu);
    lib.impl("swiglu_backward", swiglu_backward);
    lib.impl("rope", rope);
    lib.impl("rope_backward", rope_backward);
    lib.impl("attention", attention);
    lib.impl("attention_backward", attention_backward);
    lib.impl("softmax_stats", softmax_stats);
    lib.impl("softmax_gradient_", softmax_gradient_);
    lib.impl("adamw_", adamw_);
}
