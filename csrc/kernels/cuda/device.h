// What the CUDA kernels share: types, 16-byte accesses, sums over the threads of a row, launches. No torch.
//
// Also compiled by g++ with tests/csrc/cuda_emulator/include in place of CUDA's headers: hence no <<<>>>, and one array of
// shared memory. Offsets are 64-bit throughout.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels/kernels.h"

extern __shared__ __align__(16) unsigned char shared_memory[];

namespace trident::cuda {

// ---- values

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ double wide(double x) { return x; }
__device__ __forceinline__ float wide(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
__device__ __forceinline__ float wide(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ __forceinline__ T narrow(Wide<T> x) {
    if constexpr (std::is_same_v<T, bf16>)
        return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
    else if constexpr (std::is_same_v<T, f16>)
        return {__half_as_ushort(__float2half_rn(x))};
    else
        return x;
}

// N values that are read and written at once; at 16 bytes one instruction does it.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

template <class T>
constexpr int FULL = int(16 / sizeof(T));

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
    return *reinterpret_cast<const Pack<T, N>*>(from);
}
// By the intrinsic for a plain store of a vector: assigned structs are often written value by value (seen in nvcc 13's PTX).
template <int N, class T>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& x) {
    if constexpr (sizeof(T) == 2 && N > 1) {
        const auto word = [&](int i) { return unsigned(x.at[2 * i].bits) | unsigned(x.at[2 * i + 1].bits) << 16; };
        if constexpr (N == 8)
            __stwb(reinterpret_cast<uint4*>(to), uint4{word(0), word(1), word(2), word(3)});
        else
            __stwb(reinterpret_cast<uint2*>(to), uint2{word(0), word(1)});
    } else if constexpr (N == 4) {
        __stwb(reinterpret_cast<float4*>(to), float4{x.at[0], x.at[1], x.at[2], x.at[3]});
    } else if constexpr (N == 2) {
        __stwb(reinterpret_cast<double2*>(to), double2{x.at[0], x.at[1]});
    } else {
        *to = x.at[0];
    }
}

// Whether rows of `width` values that begin here can be read as packs: every pointer and the width are multiples.
template <class T, class... Pointer>
bool packs(int64_t width, const Pointer*... p) {
    return width % FULL<T> == 0 && ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

// f(integral constant): the values in a pack, FULL where all that is packed allows it, else 1.
template <class T, class F>
void by_pack(bool full, F f) {
    if (full)
        f(std::integral_constant<int, FULL<T>>());
    else
        f(std::integral_constant<int, 1>());
}

// ---- teams: the threads that work on one row, threadIdx.x of a block whose threadIdx.y are rows

constexpr int TEAM_MIN = 8, TEAM_MAX = 512, BLOCK = 256;  // powers of two

// The team for rows of so many packs, of which a thread takes `each` at a time.
inline int team_for(int64_t packs, int each) {
    int team = TEAM_MIN;
    while (team < TEAM_MAX && int64_t(team) * each < packs) team *= 2;
    return team;
}
inline dim3 block_of(int team) { return dim3(team, team < BLOCK ? BLOCK / team : 1); }

constexpr size_t TEAM_BYTES = TEAM_MAX / 32 * sizeof(double);  // shared memory that `over_team` needs

// op over the values of a team's threads, in an order that depends on the team's size only; every thread gets it. All
// threads of the block must call it.
template <class W, class F>
__device__ W over_team(W x, F op) {
    const int team = blockDim.x;
    for (int with = (team < 32 ? team : 32) / 2; with > 0; with /= 2) x = op(x, __shfl_xor_sync(0xffffffff, x, with));
    if (team <= 32) return x;
    W* parts = reinterpret_cast<W*>(shared_memory) + threadIdx.y * (team / 32);
    __syncthreads();  // what was here before has been read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = parts[0];
    for (int i = 1; i < team / 32; i++) x = op(x, parts[i]);
    return x;
}
template <class W>
__device__ W team_sum(W x) {
    return over_team(x, [](W a, W b) { return a + b; });
}

// ---- launches

inline void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Multiprocessors of the current device.
inline int processors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

// Blocks that fill the device `times` over, or fewer if the work ends before.
inline unsigned blocks_for(int64_t wanted, int times) {
    const int64_t most = int64_t(processors()) * times;
    return unsigned(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

template <class... Formal, class... Actual>
void launch(void (*kernel)(Formal...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, Actual... actual) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, Formal(actual)...));
}

}  // namespace trident::cuda
