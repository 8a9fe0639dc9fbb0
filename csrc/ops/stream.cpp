// The current CUDA stream, by what every torch has, with CUDA or without: no header of CUDA is needed to build this.

#ifdef WITH_CUDA

#include <c10/core/impl/VirtualGuardImpl.h>

#include "ops/where.h"

namespace trident::ops {

bool on_gpu(c10::Device device) { return device.is_cuda(); }

void* current_stream(c10::Device device) {
    return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

}  // namespace trident::ops

#endif
