// Device dispatch: the only place that decides where an operator's kernels run. The last argument of a CPU kernel is
// the number of threads, that of a CUDA kernel (built WITH_CUDA) a Queue.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#ifdef WITH_CUDA
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <vector>

#include "kernels/cuda/kernels.h"
#endif

namespace trident::ops {

inline int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

#ifdef WITH_CUDA

constexpr const char* DEVICES = "cpu or cuda";

// Defined in stream.cpp. Tests link a replacement that sends CPU tensors to the CUDA kernels.
bool on_gpu(c10::Device device);
void* current_stream(c10::Device device);

// Calls f(where) with the tensor's device as the current device.
template <class F>
void on_device(const at::Tensor& x, F f) {
    if (!on_gpu(x.device())) return f(threads());
    const c10::DeviceGuard guard(x.device());
    // freed when this function returns: the kernels queued on the stream by then run before any later use of the memory
    std::vector<at::Tensor> scratch;
    f(Queue{current_stream(x.device()), [&](size_t bytes) {
                scratch.push_back(at::empty({int64_t(bytes)}, x.options().dtype(at::kByte)));
                return scratch.back().data_ptr();
            }});
}

#else

constexpr const char* DEVICES = "cpu";

inline bool on_gpu(c10::Device) { return false; }

template <class F>
void on_device(const at::Tensor&, F f) {
    f(threads());
}

#endif

}  // namespace trident::ops
