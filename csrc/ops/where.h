// Where the kernels of an operator run: the one place that decides. CPU kernels take a number of threads as their last
// argument, CUDA kernels (built WITH_CUDA) a Queue.
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

// stream.cpp; tests put another in its place, which sends CPU tensors to the CUDA kernels.
bool on_gpu(c10::Device device);
void* current_stream(c10::Device device);

// f(where), with the tensor's device as the current one.
template <class F>
void on_device(const at::Tensor& x, F f) {
    if (!on_gpu(x.device())) return f(threads());
    const c10::DeviceGuard guard(x.device());
    // given back at the end; what is queued on the stream by then comes before the next use
    std::vector<at::Tensor> held;
    f(Queue{current_stream(x.device()), [&](size_t bytes) {
                held.push_back(at::empty({int64_t(bytes)}, x.options().dtype(at::kByte)));
                return held.back().data_ptr();
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
