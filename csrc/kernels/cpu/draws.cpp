// Keyed draws and dropout on the CPU.

#pragma GCC optimize("fp-contract=off")  // before the first function: see draws.h

#include "kernels/cpu/words.h"

namespace trident {

namespace {

using draws::GROUP;
using draws::over_words;

constexpr int64_t BLOCK = 4096;  // elements of a task
CLONES void draw_part(const DrawKey& key, uint64_t place, int64_t n, uint32_t* out) {
    over_words(key, place, n, [&](const uint32_t* words, int64_t i, int64_t count) INLINE_CALL {
#pragma omp simd
        for (int64_t j = 0; j < count; j++) out[i + j] = words[j];
    });
}

CLONES void draw_part(const DrawKey& key, uint64_t place, int64_t n, uint32_t threshold, bool* out) {
    over_words(key, place, n, [&](const uint32_t* words, int64_t i, int64_t count) INLINE_CALL {
#pragma omp simd
        for (int64_t j = 0; j < count; j++) out[i + j] = words[j] >= threshold;
    });
}

CLONES void uniform_part(const DrawKey& key, uint64_t place, int64_t n, float* out) {
    over_words(key, place, n, [&](const uint32_t* words, int64_t i, int64_t count) INLINE_CALL {
#pragma omp simd
        for (int64_t j = 0; j < count; j++) out[i + j] = draws::uniform(words[j]);
    });
}

CLONES void normal_part(const DrawKey& key, uint64_t place, int64_t n, float* out) {
    over_words(key, place, n, [&](const uint32_t* words, int64_t i, int64_t count) INLINE_CALL {
#pragma omp simd
        for (int64_t j = 0; j < count; j++) out[i + j] = draws::normal(words[j]);
    });
}

template <class T>
INLINE void dropout_range(const T* x, const DrawKey& key, uint64_t place, int64_t n, uint32_t threshold, Wide<T> scale,
                          T* y) {
    over_words(key, place, n, [&](const uint32_t* words, int64_t i, int64_t count) INLINE_CALL {
#pragma omp simd
        for (int64_t j = 0; j < count; j++) put(y[i + j], words[j] >= threshold ? wide(x[i + j]) * scale : Wide<T>(0));
    });
}

CLONES void dropout_part(const float* x, const DrawKey& key, uint64_t place, int64_t n, uint32_t threshold, float scale,
                         float* y) {
    dropout_range(x, key, place, n, threshold, scale, y);
}
CLONES void dropout_part(const double* x, const DrawKey& key, uint64_t place, int64_t n, uint32_t threshold,
                         double scale, double* y) {
    dropout_range(x, key, place, n, threshold, scale, y);
}
CLONES void dropout_part(const bf16* x, const DrawKey& key, uint64_t place, int64_t n, uint32_t threshold, float scale,
                         bf16* y) {
    dropout_range(x, key, place, n, threshold, scale, y);
}
CLONES void dropout_part(const f16* x, const DrawKey& key, uint64_t place, int64_t n, uint32_t threshold, float scale,
                         f16* y) {
    dropout_range(x, key, place, n, threshold, scale, y);
}

// Calls f(place, i, count) for parts of the rows: elements i .. i + count of the result, at consecutive places. Parts
// end at whole groups.
template <class F>
void over_rows(const int64_t* starts, int64_t rows, int64_t n, int threads, F f) {
    const int64_t parts = (n + GROUP - 1 + BLOCK - 1) / BLOCK;  // of a row, at any distance from a whole group
    if (n == 0) return;
    split(rows * parts, rows * n, threads, [&](int64_t a, int64_t z) {
        for (int64_t task = a; task < z; task++) {
            const int64_t row = task / parts, skip = int64_t(uint64_t(starts[row]) % GROUP);
            const int64_t begin = std::max<int64_t>(0, task % parts * BLOCK - skip);
            const int64_t end = std::min(n, (task % parts + 1) * BLOCK - skip);
            if (begin < end) f(uint64_t(starts[row]) + uint64_t(begin), row * n + begin, end - begin);
        }
    });
}

}  // namespace

void draw(const int64_t* starts, int64_t rows, int64_t n, DrawKey key, int kind, uint32_t threshold, void* out,
          int threads) {
    over_rows(starts, rows, n, threads, [=](uint64_t place, int64_t i, int64_t count) {
        switch (kind) {
            case BITS: return draw_part(key, place, count, static_cast<uint32_t*>(out) + i);
            case UNIFORM: return uniform_part(key, place, count, static_cast<float*>(out) + i);
            case NORMAL: return normal_part(key, place, count, static_cast<float*>(out) + i);
            default: return draw_part(key, place, count, threshold, static_cast<bool*>(out) + i);
        }
    });
}

template <class T>
void dropout(const T* x, const int64_t* starts, int64_t rows, int64_t n, DrawKey key, uint32_t threshold, double scale,
             T* y, int threads) {
    over_rows(starts, rows, n, threads, [=](uint64_t place, int64_t i, int64_t count) {
        dropout_part(x + i, key, place, count, threshold, Wide<T>(scale), y + i);
    });
}

template void dropout<float>(const float*, const int64_t*, int64_t, int64_t, DrawKey, uint32_t, double, float*, int);
template void dropout<double>(const double*, const int64_t*, int64_t, int64_t, DrawKey, uint32_t, double, double*, int);
template void dropout<bf16>(const bf16*, const int64_t*, int64_t, int64_t, DrawKey, uint32_t, double, bf16*, int);
template void dropout<f16>(const f16*, const int64_t*, int64_t, int64_t, DrawKey, uint32_t, double, f16*, int);

}  // namespace trident
