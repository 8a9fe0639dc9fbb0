// Keyed draws and dropout on a GPU. A thread computes one counter of Philox: four elements, 16 apart, so that the
// threads of a half warp write 16 neighbours at a time.

#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"
#include "kernels/draws.h"

namespace trident {

namespace cuda {

namespace {

using draws::GROUP;
using draws::LANES;
using draws::WORDS;

// Rows of n elements that begin at the places `starts`; groups: whole groups of places that a row can touch.
struct Rows {
    const int64_t* starts;
    int64_t rows, n, groups;
};

// Calls f(word, i) for every element i of the rows, in the threads of all blocks.
template <class F>
__device__ __forceinline__ void over_elements(const Rows& x, const DrawKey& key, F f) {
    const int64_t step = int64_t(gridDim.x) * blockDim.x, count = x.rows * x.groups * LANES;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        const int64_t row = i / LANES / x.groups;
        const uint64_t start = uint64_t(x.starts[row]), lane = uint64_t(i % LANES);
        const uint64_t group = start / GROUP + uint64_t(i / LANES % x.groups);
        uint32_t words[WORDS];
        draws::philox(key, group * LANES + lane, words[0], words[1], words[2], words[3]);
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            const int64_t at = int64_t(group * GROUP + uint64_t(w * LANES) + lane - start);  // in the row
            if (0 <= at && at < x.n) f(words[w], row * x.n + at);
        }
    }
}

template <int KIND, class T>
__global__ void __launch_bounds__(BLOCK) draw_rows(Rows x, DrawKey key, uint32_t threshold, T* out) {
    over_elements(x, key, [=](uint32_t word, int64_t i) {
        if constexpr (KIND == BITS) out[i] = word;
        if constexpr (KIND == UNIFORM) out[i] = draws::uniform(word);
        if constexpr (KIND == NORMAL) out[i] = draws::normal(word);
        if constexpr (KIND == KEEP) out[i] = word >= threshold;
    });
}

template <class T>
__global__ void __launch_bounds__(BLOCK)
    dropout_rows(Rows r, DrawKey key, uint32_t threshold, const T* x, Wide<T> scale, T* y) {
    over_elements(r, key, [=](uint32_t word, int64_t i) {
        y[i] = narrow<T>(word >= threshold ? wide(x[i]) * scale : Wide<T>(0));
    });
}

Rows rows_of(const int64_t* starts, int64_t rows, int64_t n) {
    return {starts, rows, n, (n + 2 * (GROUP - 1)) / GROUP};
}
unsigned blocks_of(const Rows& x) { return blocks_for((x.rows * x.groups * LANES + BLOCK - 1) / BLOCK, 2048 / BLOCK); }

}  // namespace

}  // namespace cuda

using namespace cuda;

void draw(const int64_t* starts, int64_t rows, int64_t n, DrawKey key, int kind, uint32_t threshold, void* out,
          const Queue& queue) {
    if (rows * n == 0) return;
    const Rows x = cuda::rows_of(starts, rows, n);
    const auto run = [&](auto kernel, auto* to) {
        launch(kernel, blocks_of(x), BLOCK, 0, queue.stream, x, key, threshold, to);
    };
    switch (kind) {
        case BITS: return run(draw_rows<BITS, uint32_t>, static_cast<uint32_t*>(out));
        case UNIFORM: return run(draw_rows<UNIFORM, float>, static_cast<float*>(out));
        case NORMAL: return run(draw_rows<NORMAL, float>, static_cast<float*>(out));
        default: return run(draw_rows<KEEP, bool>, static_cast<bool*>(out));
    }
}

template <class T>
void dropout(const T* x, const int64_t* starts, int64_t rows, int64_t n, DrawKey key, uint32_t threshold, double scale,
             T* y, const Queue& queue) {
    if (rows * n == 0) return;
    const Rows r = cuda::rows_of(starts, rows, n);
    launch(dropout_rows<T>, blocks_of(r), BLOCK, 0, queue.stream, r, key, threshold, x, Wide<T>(scale), y);
}

template void dropout<float>(const float*, const int64_t*, int64_t, int64_t, DrawKey, uint32_t, double, float*,
                             const Queue&);
template void dropout<double>(const double*, const int64_t*, int64_t, int64_t, DrawKey, uint32_t, double, double*,
                              const Queue&);
template void dropout<bf16>(const bf16*, const int64_t*, int64_t, int64_t, DrawKey, uint32_t, double, bf16*,
                            const Queue&);
template void dropout<f16>(const f16*, const int64_t*, int64_t, int64_t, DrawKey, uint32_t, double, f16*, const Queue&);

}  // namespace trident
