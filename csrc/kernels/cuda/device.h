// Shared by the CUDA kernels: types, 16-byte accesses, reductions over the threads of a row, launches. No torch.
//
// g++ compiles the kernels too, with tests/csrc/cuda_emulator/include in place of CUDA's headers, so there is no <<<>>>
// and only one array of shared memory. All offsets are 64-bit.
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

// N values that are loaded and stored together; 16 bytes take one instruction.
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
// Uses the intrinsic of a plain vector store: nvcc 13 often stores assigned structs value by value (seen in its PTX).
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

// Whether rows of `width` values at these pointers can be accessed as packs: pointers and width are multiples of a
// pack.
template <class T, class... Pointer>
bool packs(int64_t width, const Pointer*... p) {
    return width % FULL<T> == 0 && ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

// Calls f(integral constant) with the number of values per pack: FULL if `full`, else 1.
template <class T, class F>
void by_pack(bool full, F f) {
    if (full)
        f(std::integral_constant<int, FULL<T>>());
    else
        f(std::integral_constant<int, 1>());
}

// ---- teams: the threads that work on one row. In a block, threadIdx.x is the thread of a team, threadIdx.y the row.

constexpr int TEAM_MIN = 8, TEAM_MAX = 512, BLOCK = 256;  // powers of two

// The team size for rows of this many packs, if a thread processes `each` packs at a time.
inline int team_for(int64_t packs, int each) {
    int team = TEAM_MIN;
    while (team < TEAM_MAX && int64_t(team) * each < packs) team *= 2;
    return team;
}
inline dim3 block_of(int team) { return dim3(team, team < BLOCK ? BLOCK / team : 1); }

constexpr size_t TEAM_BYTES = TEAM_MAX / 32 * sizeof(double);  // shared memory that `over_team` needs

// Reduces the values of a team's threads with op, in an order that depends only on the team size; every thread gets the
// result. All threads of the block must call it.
template <class W, class F>
__device__ W over_team(W x, F op) {
    const int team = blockDim.x;
    for (int with = (team < 32 ? team : 32) / 2; with > 0; with /= 2) x = op(x, __shfl_xor_sync(0xffffffff, x, with));
    if (team <= 32) return x;
    W* parts = reinterpret_cast<W*>(shared_memory) + threadIdx.y * (team / 32);
    __syncthreads();  // earlier values have been read
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

// The number of multiprocessors of the current device.
inline int processors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

// The number of blocks: `times` per multiprocessor, or fewer if `wanted` is smaller.
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
