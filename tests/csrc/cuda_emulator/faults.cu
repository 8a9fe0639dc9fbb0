// Small kernels, each with a correct and a faulty variant: the emulator must report the faulty one only.

#include "kernels/cuda/device.h"

namespace {

constexpr int THREADS = 96;

// Every thread writes a number and reads that of the opposite thread.
__global__ void swap_numbers(float* out, bool barrier) {
    float* numbers = reinterpret_cast<float*>(shared_memory);
    numbers[threadIdx.x] = float(threadIdx.x);
    if (barrier) __syncthreads();
    out[threadIdx.x] = numbers[THREADS - 1 - threadIdx.x];
}

// The same twice with the same memory: all threads must have read before the second write.
__global__ void swap_twice(float* out, bool barrier) {
    float* numbers = reinterpret_cast<float*>(shared_memory);
    for (int round = 0; round < 2; round++) {
        numbers[threadIdx.x] = float(threadIdx.x) + 1000.0f * float(round);
        __syncthreads();
        out[threadIdx.x] += numbers[THREADS - 1 - threadIdx.x];
        if (barrier) __syncthreads();
    }
}

// Exchange between the lanes of a warp through shared memory.
__global__ void swap_in_warp(float* out, bool barrier) {
    float* numbers = reinterpret_cast<float*>(shared_memory);
    numbers[threadIdx.x] = float(threadIdx.x);
    if (barrier) __syncwarp();
    out[threadIdx.x] = numbers[threadIdx.x ^ 1];
}

__global__ void diverged_shuffle(float* out, bool together) {
    float x = float(threadIdx.x);
    if (together || threadIdx.x % 2) x = __shfl_xor_sync(0xffffffff, x, 1);
    out[threadIdx.x] = x;
}

__global__ void diverged_barrier(float* out, bool together) {
    if (together || threadIdx.x < 40) __syncthreads();
    out[threadIdx.x] = float(threadIdx.x);
}

__global__ void too_far(float* out, bool inside) {
    reinterpret_cast<float*>(shared_memory)[threadIdx.x + (inside ? 0 : 1)] = 1.0f;
    out[threadIdx.x] = 1.0f;
}

__global__ void by_another_block(float* out, bool here) {
    float* numbers = reinterpret_cast<float*>(shared_memory);
    if (here || blockIdx.x == 0) numbers[threadIdx.x] = 1.0f;
    if (blockIdx.x == gridDim.x - 1) out[threadIdx.x] = numbers[threadIdx.x];
}

}  // namespace

// Runs the kernel of this number on 96 floats, in the correct (sound) or the faulty variant; returns null or the error.
extern "C" const char* run_fault(int number, float* out, bool sound) {
    static std::string message;
    constexpr void (*kernels[])(float*, bool) = {swap_numbers,     swap_twice, swap_in_warp,    diverged_shuffle,
                                                 diverged_barrier, too_far,    by_another_block};
    try {
        trident::cuda::launch(kernels[number], number == 6 ? 4 : 1, THREADS, THREADS * sizeof(float), nullptr, out,
                              sound);
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}
