// GEMM and attention on tiles (tile.h), compiled once for each vector width; tiles.cpp selects one.
#pragma once

#include "kernels/cpu/gemm.h"
#include "kernels/kernels.h"

namespace trident {

struct Tiles {
    const char* name;
    decltype(&sgemm) gemm;
    decltype(&attention) forward;
    decltype(&attention_backward) backward;
};

// Null if the processor lacks the instructions, or the compiler was not gcc for x86-64.
const Tiles* avx512_tiles();
const Tiles* avx2_tiles();

}  // namespace trident
