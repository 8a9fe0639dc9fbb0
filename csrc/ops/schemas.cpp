// The operators `trident::*`: their schemas, and functions that describe this build.
//
// A wrong shape, type or device raises a Python error with the operator's name and never crashes. Autograd and shape
// functions are registered in Python (engine/ops); the operators here only allocate and compute. Unless stated
// otherwise, they need contiguous tensors, which the callers provide.

#include "ops/ops.h"

#include <torch/library.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "kernels/cpu/gemm.h"

namespace {

// _INTERFACE of engine/ops/native.py, raised whenever a schema or what an operator computes changes, so that an older
// build is rejected.
int64_t interface() { return 2; }

std::string built_for() { return BUILT_FOR; }

// The compute capabilities that the CUDA kernels were compiled for, as in TORCH_CUDA_ARCH_LIST; empty without kernels.
std::string cuda_capabilities() {
#ifdef WITH_CUDA
    return WITH_CUDA;
#else
    return "";
#endif
}

bool gemm_wins() { return trident::sgemm_wins(); }

bool attention_runs() { return trident::attention_runs(); }

// Keeps freed memory for later allocations, instead of returning each large tensor's pages and faulting them in again.
bool keep_freed_memory() {
#if defined(__GLIBC__)
    return mallopt(M_MMAP_THRESHOLD, 1 << 30) && mallopt(M_TRIM_THRESHOLD, 0x7fffffff) && mallopt(M_TOP_PAD, 1 << 26);
#else
    return false;
#endif
}

}  // namespace

TORCH_LIBRARY(trident, lib) {
    lib.def("interface() -> int", interface);
    lib.def("built_for() -> str", built_for);
    lib.def("cuda_capabilities() -> str", cuda_capabilities);
    lib.def("gemm_wins() -> bool", gemm_wins);
    lib.def("attention_runs() -> bool", attention_runs);
    lib.def("keep_freed_memory() -> bool", keep_freed_memory);

    lib.def("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> (Tensor y, Tensor scale)");
    lib.def(
        "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float offset) -> "
        "(Tensor sum, Tensor y, Tensor scale)");
    lib.def(
        "rms_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor scale, float offset) -> "
        "(Tensor gx, Tensor gw)");
    lib.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor stats)");
    lib.def(
        "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> "
        "(Tensor sum, Tensor y, Tensor stats)");
    lib.def(
        "layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor stats) -> "
        "(Tensor gx, Tensor gw, Tensor gb)");

    lib.def("gated(Tensor fused, int kind) -> Tensor");
    lib.def("gated_backward(Tensor grad, Tensor fused, int kind) -> Tensor");
    lib.def("rope(Tensor fused, Tensor table, int n, int m) -> (Tensor q, Tensor k, Tensor v)");
    lib.def("rope_backward(Tensor q, Tensor k, Tensor v, Tensor table) -> Tensor");
    lib.def("softmax_stats(Tensor logits, Tensor target, int valid) -> Tensor");
    lib.def(
        "softmax_gradient_(Tensor(a!) logits, Tensor target, Tensor peak, Tensor scale, Tensor grad, int valid) -> ()");

    lib.def("mm_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()");
    lib.def(
        "attention(Tensor q, Tensor k, Tensor v, Tensor? begin, float scale, Tensor? places=None, int key=0, "
        "int stream=0, int threshold=0, float keep_scale=1.0) -> (Tensor out, Tensor lse)");
    lib.def(
        "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? begin, "
        "float scale, Tensor? places=None, int key=0, int stream=0, int threshold=0, float keep_scale=1.0) -> "
        "(Tensor gq, Tensor gk, Tensor gv)");

    lib.def(
        "adamw_(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? values, float lr, "
        "float beta1, float beta2, float eps, float weight_decay, float grad_scale, int step) -> ()");
    lib.def("sum_squares(Tensor flat, Tensor bounds) -> Tensor");

    lib.def("draw(Tensor starts, int n, int key, int stream, int kind, int threshold) -> Tensor");
    lib.def("dropout(Tensor x, Tensor starts, int key, int stream, int threshold, float scale) -> Tensor");
}

namespace {

// Registers the operators that exist for all devices.
void implement_all_devices(torch::Library& lib) {
    namespace ops = trident::ops;
    lib.impl("rms_norm", ops::rms_norm);
    lib.impl("add_rms_norm", ops::add_rms_norm);
    lib.impl("rms_norm_backward", ops::rms_norm_backward);
    lib.impl("layer_norm", ops::layer_norm);
    lib.impl("add_layer_norm", ops::add_layer_norm);
    lib.impl("layer_norm_backward", ops::layer_norm_backward);
    lib.impl("gated", ops::gated);
    lib.impl("gated_backward", ops::gated_backward);
    lib.impl("rope", ops::rope);
    lib.impl("rope_backward", ops::rope_backward);
    lib.impl("softmax_stats", ops::softmax_stats);
    lib.impl("softmax_gradient_", ops::softmax_gradient_);
    lib.impl("adamw_", ops::adamw_);
    lib.impl("sum_squares", ops::sum_squares);
    lib.impl("draw", ops::draw);
    lib.impl("dropout", ops::dropout);
}

}  // namespace

TORCH_LIBRARY_IMPL(trident, CPU, lib) {
    implement_all_devices(lib);
    lib.impl("mm_", trident::ops::mm_);
    lib.impl("attention", trident::ops::attention);
    lib.impl("attention_backward", trident::ops::attention_backward);
}

#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(trident, CUDA, lib) { implement_all_devices(lib); }
#endif
