// Selects the widest tiles that this processor supports.

#include "kernels/cpu/tiles.h"

namespace trident {

namespace {

const Tiles* widest() {
    static const Tiles* const found = avx512_tiles() ? avx512_tiles() : avx2_tiles();
    return found;
}

}  // namespace

bool attention_runs() { return widest() != nullptr; }
bool sgemm_runs() { return widest() != nullptr; }
bool sgemm_wins() {
#if defined(__x86_64__) && defined(__GNUC__)
    return sgemm_runs() && __builtin_cpu_is("amd");
#else
    return false;
#endif
}

void sgemm(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, bool add, int threads) {
    widest()->gemm(m, n, k, a, b, c, ldc, add, threads);
}

void attention(Heads<const float> q, Heads<const float> k, Heads<const float> v, const int64_t* begin, float* out,
               float* lse, AttentionShape shape, double scale, WeightDropout dropout, int threads) {
    widest()->forward(q, k, v, begin, out, lse, shape, scale, dropout, threads);
}

void attention_backward(Heads<const float> grad, Heads<const float> q, Heads<const float> k, Heads<const float> v,
                        const int64_t* begin, const float* out, const float* lse, Heads<float> gq, Heads<float> gk,
                        Heads<float> gv, AttentionShape shape, double scale, WeightDropout dropout, int threads) {
    widest()->backward(grad, q, k, v, begin, out, lse, gq, gk, gv, shape, scale, dropout, threads);
}

}  // namespace trident
