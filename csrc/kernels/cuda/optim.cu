// The optimizer's kernels on flat buckets on a GPU: AdamW, and sums of squares for the gradient norm.

#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"

namespace trident {

namespace cuda {

namespace {

// ---- AdamW

template <class W>
struct Factors {
    W decay, beta2, rest1, rest2, rate, root, eps, scale;
};

template <class W, class T>
struct Flat {
    W* master;
    const W* grad;
    W *m, *v;
    T* values;
    int64_t n;
};

template <int N, class W, class T>
__device__ __forceinline__ void update(const Flat<W, T>& a, int64_t i, const Factors<W>& f) {
    Pack<W, N> p = load<N>(a.master + i), m = load<N>(a.m + i), v = load<N>(a.v + i);
    const Pack<W, N> g = load<N>(a.grad + i);
    Pack<T, N> low;
#pragma unroll
    for (int j = 0; j < N; j++) {
        const W grad = g.at[j] * f.scale;
        m.at[j] += f.rest1 * (grad - m.at[j]);
        v.at[j] = f.beta2 * v.at[j] + f.rest2 * (grad * grad);
        p.at[j] = p.at[j] * f.decay - f.rate * m.at[j] / (std::sqrt(v.at[j]) / f.root + f.eps);
        low.at[j] = narrow<T>(p.at[j]);
    }
    store(a.master + i, p);
    store(a.m + i, m);
    store(a.v + i, v);
    if (a.values) store(a.values + i, low);
}

template <int N, class W, class T>
__global__ void __launch_bounds__(BLOCK) adamw_step(Flat<W, T> a, Factors<W> f) {
    const int64_t step = int64_t(gridDim.x) * blockDim.x, packs = a.n / N;
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < a.n - packs * N) update<1>(a, packs * N + i, f);
    for (; i < packs; i += step) update<N>(a, i * N, f);
}

// ---- sums of squares: every block processes one share of every range, a different share in each, to balance the load

constexpr int SHARES = 512, AHEAD = 4;

template <class T>
__device__ double square(T x) {
    return double(wide(x)) * double(wide(x));
}

template <class T>
__global__ void __launch_bounds__(BLOCK)
    share_squares(const T* x, int64_t n, const int64_t* bounds, double* parts, int64_t k) {
    constexpr int N = FULL<T>;
    for (int64_t range = 0; range < k; range++) {
        const int64_t begin = bounds[2 * range], end = bounds[2 * range + 1],
                      share = (blockIdx.x + range * 37) % SHARES;
        double sum = 0;
        if (begin < 0 || begin > end || end > n) {
            sum = NAN;
        } else {
            const int64_t off = int64_t(reinterpret_cast<uintptr_t>(x + begin) % 16 / sizeof(T)), count = end - begin;
            const int64_t head = off == 0 ? 0 : N - off < count ? N - off : count, packs = (count - head) / N;
            const int64_t tail = head + packs * N, step = int64_t(SHARES) * BLOCK;
            if (share == 0) {  // the values before and after the packs, fewer than a block has threads
                if (threadIdx.x < head) sum += square(x[begin + threadIdx.x]);
                if (tail + threadIdx.x < count) sum += square(x[begin + tail + threadIdx.x]);
            }
            for (int64_t i = share * BLOCK + threadIdx.x; i < packs; i += AHEAD * step) {
                Pack<T, N> kept[AHEAD];
#pragma unroll
                for (int a = 0; a < AHEAD; a++)
                    if (i + a * step < packs) kept[a] = load<N>(x + begin + head + (i + a * step) * N);
#pragma unroll
                for (int a = 0; a < AHEAD; a++)
                    if (i + a * step < packs)
#pragma unroll
                        for (int j = 0; j < N; j++) sum += square(kept[a].at[j]);
            }
        }
        if (share == 0 || share * BLOCK * N < end - begin) sum = team_sum(sum);  // the same condition for all threads
        if (threadIdx.x == 0) parts[range * SHARES + share] = sum;
    }
}

__global__ void __launch_bounds__(BLOCK) add_shares(const double* parts, double* out) {
    double sum = 0;
    for (int i = threadIdx.x; i < SHARES; i += BLOCK) sum += parts[int64_t(blockIdx.x) * SHARES + i];
    sum = team_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

}  // namespace

}  // namespace cuda

using namespace cuda;

template <class W, class T>
void adamw(W* master, const W* grad, W* m, W* v, T* values, int64_t n, AdamW how, const Queue& queue) {
    if (n == 0) return;
    const double correction1 = 1 - std::pow(how.beta1, double(how.step));
    const double correction2 = 1 - std::pow(how.beta2, double(how.step));
    const Factors<W> f{
        W(1 - how.lr * how.weight_decay), W(how.beta2), W(1 - how.beta1), W(1 - how.beta2), W(how.lr / correction1),
        W(std::sqrt(correction2)),        W(how.eps),   W(how.scale)};
    const bool low = reinterpret_cast<uintptr_t>(values) % (FULL<W> * sizeof(T)) == 0;
    by_pack<W>(low && packs<W>(0, master, grad, m, v), [&](auto count) {
        const unsigned blocks = blocks_for((n / count + BLOCK - 1) / BLOCK, 2048 / BLOCK);
        launch(adamw_step<count, W, T>, blocks, BLOCK, 0, queue.stream, Flat<W, T>{master, grad, m, v, values, n}, f);
    });
}

template <class T>
void sum_squares(const T* x, int64_t n, const int64_t* bounds, double* out, int64_t k, const Queue& queue) {
    if (k == 0) return;
    double* parts = static_cast<double*>(queue.scratch(size_t(k) * SHARES * sizeof(double)));
    launch(share_squares<T>, SHARES, BLOCK, TEAM_BYTES, queue.stream, x, n, bounds, parts, k);
    launch(add_shares, unsigned(k), BLOCK, TEAM_BYTES, queue.stream, parts, out);
}

template void adamw<float, float>(float*, const float*, float*, float*, float*, int64_t, AdamW, const Queue&);
template void adamw<float, bf16>(float*, const float*, float*, float*, bf16*, int64_t, AdamW, const Queue&);
template void adamw<float, f16>(float*, const float*, float*, float*, f16*, int64_t, AdamW, const Queue&);
template void adamw<double, double>(double*, const double*, double*, double*, double*, int64_t, AdamW, const Queue&);
template void sum_squares<float>(const float*, int64_t, const int64_t*, double*, int64_t, const Queue&);
template void sum_squares<double>(const double*, int64_t, const int64_t*, double*, int64_t, const Queue&);
template void sum_squares<bf16>(const bf16*, int64_t, const int64_t*, double*, int64_t, const Queue&);
template void sum_squares<f16>(const f16*, int64_t, const int64_t*, double*, int64_t, const Queue&);

}  // namespace trident
