// The current CUDA stream, through an interface that every torch has, so that building this needs no CUDA headers.

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
