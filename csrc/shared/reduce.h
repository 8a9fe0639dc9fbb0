// Sums, maxima and minima over n arrays, element by element, for channel.cpp. Raw pointers, no torch.
#pragma once

#include <cstdint>

namespace trident {

enum class Scalar : int { f32 = 0, f64, bf16, f16, i64, i32, u8, b8 };  // b8: bytes that are 0 or 1

enum Reduction : int { SUM = 0, MAX, MIN };

uint64_t size_of(Scalar kind);
const char* name_of(uint64_t kind);
const char* reduction_name(uint64_t reduction);

// to[i] = in[0][i] (+) in[1][i] (+) ..., from left to right; half precision in float, rounded once. `to` may be one of
// the arrays. A floating-point maximum or minimum is NaN if any input is NaN; a sum of booleans is their maximum.
void reduce(Scalar kind, int reduction, const char* const* in, int n, char* to, int64_t count);

}  // namespace trident
