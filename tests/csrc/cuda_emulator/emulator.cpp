// Runs kernels on the CPU: see include/cuda_runtime.h.
//
// Threads run in an adversarial order that CUDA allows, drawn from a seed for each block and after each block barrier:
// the warps run in a random order, each as far as possible before the next starts, and between two warp-wide exchanges
// the lanes of a warp do the same. So a missing barrier gives a wrong result with most seeds. Shared memory is NaN when
// a block starts, because values of another block must not be read, and the memory after the requested bytes is
// watched.
//
// These faults end a launch with an error that names the waiting threads: a warp-wide exchange that a lane of its mask
// never joins, a lane that reads from a lane outside the mask, a block barrier that some threads never reach, an
// invalid launch configuration, and a write beyond the requested shared memory.

#include <csetjmp>
#include <ucontext.h>

#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "include/cuda_runtime.h"

// ASan has to be notified of every stack switch; in other builds these functions do nothing.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(kept, stack, size) (void)(kept)
#define __sanitizer_finish_switch_fiber(kept, stack, size) (void)(kept)
#define ASAN_POISON_MEMORY_REGION(begin, size)
#define ASAN_UNPOISON_MEMORY_REGION(begin, size)
#endif

namespace emulator {

constexpr size_t GUARD_BYTES = 4096;  // after the largest shared memory that a launch can request
constexpr unsigned char FILL = 0xff;  // as floats and doubles: NaN

}  // namespace emulator

alignas(128) unsigned char shared_memory[emulator::SHARED_BYTES + emulator::GUARD_BYTES];

namespace emulator {

namespace {

constexpr size_t STACK_BYTES = 64 << 10;

enum class State { ready, exchanging, at_barrier, done };

struct Fiber {
    ucontext_t begin;  // first entered through this, then by jumps, which need no system calls
    jmp_buf again;
    bool entered = false;
    std::unique_ptr<char[]> stack;
    void* kept = nullptr;  // used by ASan
    State state = State::ready;
    uint3 thread;
    unsigned mask;  // of the exchange that it waits for
    bool turn;      // which of the warp's two value sets its next exchange uses
};

struct Warp {
    uint64_t values[2][WARP];  // two, because a lane may be one exchange ahead of a lane that has not read yet
};

Fiber fibers[MAX_THREADS];
Warp warps[MAX_THREADS / WARP];
jmp_buf scheduler;
void* scheduler_kept = nullptr;
[[maybe_unused]] const void* scheduler_stack = nullptr;
[[maybe_unused]] size_t scheduler_bytes = 0;
int running = 0;  // index of the running fiber
const std::function<void()>* body = nullptr;
std::mt19937_64 order_source(1);
int processors = 3;  // few, so that small tests iterate grid-stride loops
std::string fault;

void yield() {
    Fiber& me = fibers[running];
    __sanitizer_start_switch_fiber(&me.kept, scheduler_stack, scheduler_bytes);
    if (!_setjmp(me.again)) _longjmp(scheduler, 1);
    __sanitizer_finish_switch_fiber(me.kept, &scheduler_stack, &scheduler_bytes);
}

// The main function of a fiber; runs one block after another.
void enter() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_bytes);
    while (true) {
        (*body)();
        fibers[running].state = State::done;
        yield();
    }
}

void resume(int i) {
    Fiber& f = fibers[i];
    running = i;
    here.thread = f.thread;
    __sanitizer_start_switch_fiber(&scheduler_kept, f.stack.get(), STACK_BYTES);
    if (!_setjmp(scheduler)) {
        if (f.entered) _longjmp(f.again, 1);
        f.entered = true;
        setcontext(&f.begin);
    }
    __sanitizer_finish_switch_fiber(scheduler_kept, nullptr, nullptr);
}

void prepare(int i) {
    Fiber& f = fibers[i];
    if (f.state != State::done) {  // new, or abandoned in a failed launch
        if (!f.stack) f.stack.reset(new char[STACK_BYTES]);
        getcontext(&f.begin);
        f.begin.uc_stack = {f.stack.get(), 0, STACK_BYTES};
        f.begin.uc_link = nullptr;
        makecontext(&f.begin, enter, 0);
        f.entered = false;
    }
    const dim3 size = here.block_size;
    f.thread = {unsigned(i) % size.x, unsigned(i) / size.x % size.y, unsigned(i) / (size.x * size.y)};
    f.state = State::ready;
    f.turn = false;
}

std::string name(int i) {
    const uint3 t = fibers[i].thread, b = here.block;
    const auto text = [](uint3 p) {
        return "(" + std::to_string(p.x) + ", " + std::to_string(p.y) + ", " + std::to_string(p.z) + ")";
    };
    return "thread " + text(t) + " of block " + text(b);
}

// Resumes the lanes of a warp whose exchange is complete; returns false if there are none.
bool complete_exchanges(int first, int count) {
    bool any = false;
    for (int i = first; i < first + count; i++) {
        if (fibers[i].state != State::exchanging) continue;
        bool all = true;
        for (int lane = 0; lane < WARP; lane++)
            if (fibers[i].mask >> lane & 1)
                all &= lane < count && fibers[first + lane].state == State::exchanging &&
                       fibers[first + lane].mask == fibers[i].mask;
        if (!all) continue;
        const unsigned mask = fibers[i].mask;
        for (int lane = 0; lane < count; lane++)
            if (mask >> lane & 1) fibers[first + lane].state = State::ready;
        any = true;
    }
    return any;
}

// Runs a warp until all its threads have reached a block barrier or returned.
bool run_warp(int first, int count) {
    std::vector<int> lanes(count);
    std::iota(lanes.begin(), lanes.end(), first);
    do {
        std::shuffle(lanes.begin(), lanes.end(), order_source);
        for (int i : lanes)
            if (fibers[i].state == State::ready) resume(i);
        if (!fault.empty()) return false;
    } while (complete_exchanges(first, count));
    for (int i : lanes)
        if (fibers[i].state == State::exchanging) {
            fault = name(i) + " waits in a warp-wide exchange that not all lanes of its mask join";
            return false;
        }
    return true;
}

bool run_block(int threads, size_t shared_bytes) {
    std::memset(shared_memory, FILL, sizeof shared_memory);
    ASAN_POISON_MEMORY_REGION(shared_memory + shared_bytes, sizeof shared_memory - shared_bytes);
    for (int i = 0; i < threads; i++) prepare(i);
    std::vector<int> order((threads + WARP - 1) / WARP);
    std::iota(order.begin(), order.end(), 0);
    for (bool over = false; !over && fault.empty();) {
        std::shuffle(order.begin(), order.end(), order_source);
        for (int w : order)
            if (!run_warp(w * WARP, std::min(WARP, threads - w * WARP))) break;
        if (!fault.empty()) break;
        int waiting = 0, waits = 0;
        for (int i = 0; i < threads; i++)
            if (fibers[i].state == State::at_barrier) waiting++, waits = i, fibers[i].state = State::ready;
        over = waiting == 0;
        if (!over && waiting < threads)
            fault = name(waits) + " waits at __syncthreads, and others of its block have returned";
    }
    ASAN_UNPOISON_MEMORY_REGION(shared_memory, sizeof shared_memory);
    for (size_t i = shared_bytes; i < shared_bytes + GUARD_BYTES && fault.empty(); i++)
        if (shared_memory[i] != FILL)
            fault = "byte " + std::to_string(i) + " of shared memory was written, " + std::to_string(shared_bytes) +
                    " were asked for";
    return fault.empty();
}

}  // namespace

Position here;

void block_barrier() {
    fibers[running].state = State::at_barrier;
    yield();
}

uint64_t exchange(unsigned mask, uint64_t bits, int from) {
    Fiber& me = fibers[running];
    Warp& warp = warps[running / WARP];
    const bool turn = me.turn;
    const int lane = running % WARP;
    if (!(mask >> lane & 1) || !(mask >> from & 1)) {
        fault = name(running) + " asks a lane that is not in its mask";
        me.state = State::exchanging;
        me.mask = 0;
        yield();
    }
    warp.values[turn][lane] = bits;
    me.turn = !turn;
    me.mask = mask;
    me.state = State::exchanging;
    yield();
    return warp.values[turn][from];
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
    const dim3 grid = config.gridDim, block = config.blockDim;
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > MAX_THREADS || block.z > 64 || grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 ||
        grid.y > 65535 || grid.z == 0 || grid.z > 65535 || config.dynamicSmemBytes > SHARED_BYTES)
        return cudaErrorInvalidConfiguration;
    body = &kernel;
    here.grid_size = grid;
    here.block_size = block;
    fault.clear();
    std::vector<uint64_t> blocks(uint64_t(grid.x) * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), order_source);
    for (uint64_t i : blocks) {
        here.block = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
        if (!run_block(int(threads), config.dynamicSmemBytes)) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

}  // namespace emulator

const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorLaunchFailure) return emulator::fault.c_str();
    return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    return *value = emulator::processors, cudaSuccess;
}

// For tests: sets the seed of the order, and the number of multiprocessors of the GPU.
extern "C" void emulator_seed(uint64_t seed, int processors) {
    emulator::order_source.seed(seed);
    emulator::processors = processors;
}
