// Products and attention on tiles (tile.h), compiled once for each width of vectors; tiles.cpp picks.
#pragma once

#include "kernels/cpu/gemm.h"
#include "kernels/kernels.h"

namespace trident {

struct Tiles {
    const char* name;
    decltype(&sgemm) product;
    decltype(&attention) forward;
    decltype(&attention_backward) backward;
};

// Null where this processor has not what they need, or the compiler was not gcc for x86-64.
const Tiles* avx512_tiles();
const Tiles* avx2_tiles();

}  // namespace trident
