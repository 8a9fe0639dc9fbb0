// The part of CUDA that the kernels of csrc use, for a plain C++ compiler. It replaces NVIDIA's header of the same
// name, so that the same .cu files run on a CPU: one fiber per thread, one block at a time (in the order of
// emulator.cpp). `__shared__` is supported for `extern` arrays at namespace scope only, so that all shared memory is
// one watched array.
//
// It verifies indices, barriers and arithmetic, but not speed; floating-point functions are those of the C library.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };
using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    void* attrs = nullptr;
    unsigned numAttrs = 0;
};

namespace emulator {

constexpr int MAX_THREADS = 1024, WARP = 32;
constexpr size_t SHARED_BYTES = 48 << 10;  // a GPU needs an explicit request for more

struct Position {
    uint3 thread, block;
    dim3 block_size, grid_size;
};
extern Position here;  // of the running fiber

void block_barrier();
// Each lane of `mask` provides a value of up to 8 bytes and receives the value of lane `from`.
uint64_t exchange(unsigned mask, uint64_t bits, int from);
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

template <class T>
T shuffle(unsigned mask, T value, int from) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = exchange(mask, bits, from);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

inline int lane() {
    const auto [x, y, z] = here.thread;
    return int(((z * here.block_size.y + y) * here.block_size.x + x) % WARP);
}

}  // namespace emulator

inline const uint3 &threadIdx = emulator::here.thread, &blockIdx = emulator::here.block;
inline const dim3 &blockDim = emulator::here.block_size, &gridDim = emulator::here.grid_size;
constexpr int warpSize = emulator::WARP;

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffff) { emulator::exchange(mask, 0, emulator::lane()); }
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
    return emulator::shuffle(mask, value, from % warpSize);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
    return emulator::shuffle(mask, value, emulator::lane() ^ with);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
    const int from = emulator::lane() + int(by);
    return emulator::shuffle(mask, value, from < warpSize ? from : emulator::lane());
}

template <class T>
void __stwb(T* to, T value) {
    *to = value;
}
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __expf(float x) { return std::exp(x); }

// As in the CUDA runtime, arguments are converted to the kernel's parameter types.
template <class... Formal, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Formal...), Actual&&... actual) {
    return emulator::run(*config, [&] { kernel(Formal(actual)...); });
}
const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
