// Single-precision GEMM for the shapes of a training step. See gemm_tiles.h.
#pragma once

#include <cstdint>

namespace trident {

// Element (i, j) is p[i * row + j * col]; one of the two strides is 1.
struct Matrix {
    const float* p;
    int64_t row, col;
};

// Whether this processor can run `sgemm`, and whether `sgemm` is faster than torch's library on it: see gemm_tiles.h.
bool sgemm_runs();
bool sgemm_wins();

// c[i * ldc + j] = sum_k a(i, k) b(k, j), or += if `add`. c must not overlap a or b.
//
// The order of an element's sum depends only on k: not on m, n, the threads or the element's place.
void sgemm(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, bool add, int threads);

}  // namespace trident
