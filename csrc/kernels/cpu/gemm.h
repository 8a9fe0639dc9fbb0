// Single-precision matrix products for the shapes of a training step. See gemm_tiles.h.
#pragma once

#include <cstdint>

namespace trident {

// Element (i, j) lies at p[i * row + j * col]; one of the two strides is 1.
struct Matrix {
    const float* p;
    int64_t row, col;
};

// Whether this processor can run `sgemm` at all, and whether it should: see gemm_tiles.h.
bool sgemm_runs();
bool sgemm_wins();

// c[i * ldc + j] = sum_k a(i, k) b(k, j), added to what is there if `add`. c does not overlap a or b.
//
// The terms of an element are added in an order that depends on k alone: not on m, n, threads or where the element lies.
void sgemm(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, bool add, int threads);

}  // namespace trident
