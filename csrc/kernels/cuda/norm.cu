// RMSNorm and LayerNorm on a GPU. A team of threads processes a row and keeps it in registers until the output is
// written, so memory is read once and written once. A thread has the same columns in all rows, so it loads their
// weights once and accumulates their gradients in registers. Each team then writes one row of partial sums, and a
// second kernel adds these rows in a fixed order. There are no atomics, so the same device gives the same bits.

#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"

namespace trident {

namespace cuda {

namespace {

constexpr int KEEP = 2;  // packs of a row that a thread holds in registers; the rest is re-read from cache

template <class T>
struct Forward {
    const T *x, *residual, *w, *b;
    T *sum, *y;
    Wide<T>*mean, *scale;
    int64_t rows, h;
    Wide<T> eps, offset;
};

template <class T, int N, bool CENTRED>
__global__ void __launch_bounds__(TEAM_MAX) forward(Forward<T> a) {
    using W = Wide<T>;
    const int64_t packs = a.h / N, team = blockDim.x, rest = threadIdx.x + KEEP * team;
    Pack<T, N> kept[KEEP], more[KEEP], weight[KEEP], bias[KEEP];
    bool mine[KEEP];
#pragma unroll
    for (int k = 0; k < KEEP; k++) {
        const int64_t i = threadIdx.x + k * team;
        if (!(mine[k] = i < packs)) continue;
        weight[k] = load<N>(a.w + i * N);
        if (CENTRED) bias[k] = load<N>(a.b + i * N);
    }
    for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < a.rows; first += int64_t(gridDim.x) * blockDim.y) {
        const int64_t row = first + threadIdx.y, begin = row * a.h;
        const bool there = row < a.rows;
        const int64_t end = there ? packs : 0;
        const auto add = [&](Pack<T, N>& x, const Pack<T, N>& y, int64_t i) {
#pragma unroll
            for (int j = 0; j < N; j++) x.at[j] = narrow<T>(wide(x.at[j]) + wide(y.at[j]));
            store(a.sum + begin + i * N, x);
        };
        const auto total = [&](auto of) {  // sum of of(value) over the row
            W part = 0;
#pragma unroll
            for (int k = 0; k < KEEP; k++)
                if (there && mine[k])
#pragma unroll
                    for (int j = 0; j < N; j++) part += of(wide(kept[k].at[j]));
            for (int64_t i = rest; i < end; i += team) {
                const Pack<T, N> x = load<N>((a.residual ? a.sum : a.x) + begin + i * N);
#pragma unroll
                for (int j = 0; j < N; j++) part += of(wide(x.at[j]));
            }
            return team_sum(part);
        };
#pragma unroll
        for (int k = 0; k < KEEP; k++) {
            const int64_t i = threadIdx.x + k * team;
            if (!there || !mine[k]) continue;
            kept[k] = load<N>(a.x + begin + i * N);
            if (a.residual) more[k] = load<N>(a.residual + begin + i * N);
        }
        if (a.residual) {
#pragma unroll
            for (int k = 0; k < KEEP; k++)
                if (there && mine[k]) add(kept[k], more[k], threadIdx.x + k * team);
            for (int64_t i = rest; i < end; i += team) {
                Pack<T, N> x = load<N>(a.x + begin + i * N);
                add(x, load<N>(a.residual + begin + i * N), i);
            }
        }
        const W mean = CENTRED ? total([](W x) { return x; }) / W(a.h) : W(0);
        const W squares = total([&](W x) { return (x - mean) * (x - mean); });
        const W scale = W(1) / std::sqrt(squares / W(a.h) + a.eps);
        if (there && threadIdx.x == 0) {
            if (CENTRED) a.mean[row] = mean;
            a.scale[row] = scale;
        }
        const auto write = [&](Pack<T, N> x, const Pack<T, N>& w, const Pack<T, N>& b, int64_t i) {
#pragma unroll
            for (int j = 0; j < N; j++) {
                const W normed = (wide(x.at[j]) - mean) * scale;
                if (CENTRED)
                    x.at[j] = narrow<T>(normed * wide(w.at[j]) + wide(b.at[j]));
                else if (a.offset == 0)
                    x.at[j] = narrow<T>(wide(narrow<T>(normed)) * wide(w.at[j]));
                else
                    x.at[j] = narrow<T>(normed * (wide(w.at[j]) + a.offset));
            }
            store(a.y + begin + i * N, x);
        };
#pragma unroll
        for (int k = 0; k < KEEP; k++)
            if (there && mine[k]) write(kept[k], weight[k], bias[k], threadIdx.x + k * team);
        for (int64_t i = rest; i < end; i += team) {
            const Pack<T, N> w = load<N>(a.w + i * N);
            write(load<N>((a.residual ? a.sum : a.x) + begin + i * N), w, CENTRED ? load<N>(a.b + i * N) : w, i);
        }
    }
}

template <class T>
struct Backward {
    const T *grad, *more, *x, *w;
    const Wide<T>*mean, *scale;
    T* gx;
    Wide<T>* parts;  // [1 or, with b, 2; teams; h]
    int64_t rows, h;
    Wide<T> offset;
};

template <class T, int N, bool CENTRED>
__global__ void __launch_bounds__(TEAM_MAX) backward(Backward<T> a) {
    using W = Wide<T>;
    const int64_t packs = a.h / N, team = blockDim.x, rest = threadIdx.x + KEEP * team;
    const int64_t teams = int64_t(gridDim.x) * blockDim.y;
    W* parts_w = a.parts + (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * a.h;
    W* parts_b = parts_w + teams * a.h;
    Pack<T, N> grad[KEEP], x[KEEP], weight[KEEP];
    W sum_w[KEEP][N] = {}, sum_b[KEEP][N] = {};
    bool mine[KEEP];
#pragma unroll
    for (int k = 0; k < KEEP; k++) {
        const int64_t i = threadIdx.x + k * team;
        if ((mine[k] = i < packs)) weight[k] = load<N>(a.w + i * N);
    }
    for (int64_t i = rest; i < packs; i += team)  // columns beyond KEEP packs; no other thread uses them
        for (int j = 0; j < N; j++) {
            parts_w[i * N + j] = 0;
            if (CENTRED) parts_b[i * N + j] = 0;
        }
    for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < a.rows; first += int64_t(gridDim.x) * blockDim.y) {
        const int64_t row = first + threadIdx.y, begin = row * a.h;
        const bool there = row < a.rows;
        const int64_t end = there ? packs : 0;
#pragma unroll
        for (int k = 0; k < KEEP; k++) {
            const int64_t i = threadIdx.x + k * team;
            if (!there || !mine[k]) continue;
            grad[k] = load<N>(a.grad + begin + i * N);
            x[k] = load<N>(a.x + begin + i * N);
        }
        const W scale = there ? a.scale[row] : W(0), mean = CENTRED && there ? a.mean[row] : W(0);
        W along = 0, level = 0;
        const auto add = [&](const Pack<T, N>& g, const Pack<T, N>& x, const Pack<T, N>& w, W* to_w, W* to_b) {
#pragma unroll
            for (int j = 0; j < N; j++) {
                const W gradient = wide(g.at[j]), gn = gradient * ((wide(x.at[j]) - mean) * scale);
                to_w[j] += gn;
                along += gn * (wide(w.at[j]) + a.offset);
                if (!CENTRED) continue;
                to_b[j] += gradient;
                level += gradient * wide(w.at[j]);
            }
        };
#pragma unroll
        for (int k = 0; k < KEEP; k++)
            if (there && mine[k]) add(grad[k], x[k], weight[k], sum_w[k], sum_b[k]);
        for (int64_t i = rest * N; i < end * N; i += team * N)
            add(load<N>(a.grad + begin + i), load<N>(a.x + begin + i), load<N>(a.w + i), parts_w + i, parts_b + i);
        along = team_sum(along) / W(a.h);
        if (CENTRED) level = team_sum(level) / W(a.h);
        const auto write = [&](const Pack<T, N>& g, const Pack<T, N>& x, const Pack<T, N>& w, int64_t i) {
            Pack<T, N> out, more;
            if (a.more) more = load<N>(a.more + begin + i);
#pragma unroll
            for (int j = 0; j < N; j++) {
                const W normed = (wide(x.at[j]) - mean) * scale;
                const W gradient = scale * (wide(g.at[j]) * (wide(w.at[j]) + a.offset) - level - normed * along);
                out.at[j] = narrow<T>(a.more ? wide(more.at[j]) + gradient : gradient);
            }
            store(a.gx + begin + i, out);
        };
#pragma unroll
        for (int k = 0; k < KEEP; k++)
            if (there && mine[k]) write(grad[k], x[k], weight[k], (threadIdx.x + k * team) * N);
        for (int64_t i = rest * N; i < end * N; i += team * N)
            write(load<N>(a.grad + begin + i), load<N>(a.x + begin + i), load<N>(a.w + i), i);
    }
#pragma unroll
    for (int k = 0; k < KEEP; k++) {
        if (!mine[k]) continue;
        const int64_t i = (threadIdx.x + k * team) * N;
#pragma unroll
        for (int j = 0; j < N; j++) {
            parts_w[i + j] = sum_w[k][j];
            if (CENTRED) parts_b[i + j] = sum_b[k][j];
        }
    }
}

template <class T>
struct Sums {
    T* to[2];
};

constexpr int COLUMNS = 32, RUNS = 16;  // shape of a block; a thread adds every RUNS-th row of its column

// to[blockIdx.y][column] = the sum of parts [gridDim.y, teams, h] over the teams.
template <class T>
__global__ void add_parts(const Wide<T>* parts, int64_t teams, int64_t h, Sums<T> sums) {
    using W = Wide<T>;
    W* runs = reinterpret_cast<W*>(shared_memory);
    const int64_t column = int64_t(blockIdx.x) * COLUMNS + threadIdx.x;
    parts += blockIdx.y * teams * h + column;
    W sum = 0;
    if (column < h)
        for (int64_t i = threadIdx.y; i < teams; i += RUNS) sum += parts[i * h];
    runs[threadIdx.y * COLUMNS + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= h) return;
    for (int i = 1; i < RUNS; i++) sum += runs[i * COLUMNS + threadIdx.x];
    sums.to[blockIdx.y][column] = narrow<T>(sum);
}

template <class T, bool CENTRED>
void run_forward(const Forward<T>& a, bool packed, const Queue& queue) {
    if (a.rows == 0 || a.h == 0) return;
    by_pack<T>(packed, [&](auto n) {
        const dim3 block = block_of(team_for(a.h / n, KEEP));
        const int64_t wanted = (a.rows + block.y - 1) / block.y;
        const unsigned blocks = blocks_for(wanted, 2048 / int(block.x * block.y));
        launch(forward<T, n, CENTRED>, blocks, block, TEAM_BYTES, queue.stream, a);
    });
}

template <class T, bool CENTRED>
void run_backward(Backward<T> a, Sums<T> sums, bool packed, const Queue& queue) {
    using W = Wide<T>;
    const unsigned outs = CENTRED ? 2 : 1;
    if (a.h == 0) return;
    int64_t teams = 0;
    if (a.rows > 0)
        by_pack<T>(packed, [&](auto n) {
            const dim3 block = block_of(team_for(a.h / n, KEEP));
            const unsigned blocks = blocks_for((a.rows + block.y - 1) / block.y, 1024 / int(block.x * block.y));
            teams = int64_t(blocks) * block.y;
            a.parts = static_cast<W*>(queue.scratch(size_t(outs * teams * a.h) * sizeof(W)));
            launch(backward<T, n, CENTRED>, blocks, block, TEAM_BYTES, queue.stream, a);
        });
    const dim3 grid(unsigned((a.h + COLUMNS - 1) / COLUMNS), outs);
    launch(add_parts<T>, grid, dim3(COLUMNS, RUNS), COLUMNS * RUNS * sizeof(W), queue.stream, a.parts, teams, a.h,
           sums);
}

}  // namespace

}  // namespace cuda

using namespace cuda;

template <class T>
void rms_norm(const T* x, const T* residual, T* sum, const T* w, T* y, Wide<T>* scale, int64_t rows, int64_t h,
              double eps, double offset, const Queue& queue) {
    using W = Wide<T>;
    run_forward<T, false>({x, residual, w, nullptr, sum, y, nullptr, scale, rows, h, W(eps), W(offset)},
                          packs<T>(h, x, residual, sum, w, y), queue);
}

template <class T>
void rms_norm_backward(const T* grad, const T* grad_sum, const T* x, const T* w, const Wide<T>* scale, T* gx, T* gw,
                       int64_t rows, int64_t h, double offset, const Queue& queue) {
    run_backward<T, false>({grad, grad_sum, x, w, nullptr, scale, gx, nullptr, rows, h, Wide<T>(offset)},
                           {{gw, nullptr}}, packs<T>(h, grad, grad_sum, x, w, gx), queue);
}

template <class T>
void layer_norm(const T* x, const T* residual, T* sum, const T* w, const T* b, T* y, Wide<T>* stats, int64_t rows,
                int64_t h, double eps, const Queue& queue) {
    using W = Wide<T>;
    run_forward<T, true>({x, residual, w, b, sum, y, stats, stats + rows, rows, h, W(eps), W(0)},
                         packs<T>(h, x, residual, sum, w, b, y), queue);
}

template <class T>
void layer_norm_backward(const T* grad, const T* grad_sum, const T* x, const T* w, const Wide<T>* stats, T* gx, T* gw,
                         T* gb, int64_t rows, int64_t h, const Queue& queue) {
    run_backward<T, true>({grad, grad_sum, x, w, stats, stats + rows, gx, nullptr, rows, h, Wide<T>(0)}, {{gw, gb}},
                          packs<T>(h, grad, grad_sum, x, w, gx), queue);
}

#define INSTANTIATE(T)                                                                                                \
    template void rms_norm<T>(const T*, const T*, T*, const T*, T*, Wide<T>*, int64_t, int64_t, double, double,       \
                              const Queue&);                                                                          \
    template void rms_norm_backward<T>(const T*, const T*, const T*, const T*, const Wide<T>*, T*, T*, int64_t,       \
                                       int64_t, double, const Queue&);                                                \
    template void layer_norm<T>(const T*, const T*, T*, const T*, const T*, T*, Wide<T>*, int64_t, int64_t, double,   \
                                const Queue&);                                                                        \
    template void layer_norm_backward<T>(const T*, const T*, const T*, const T*, const Wide<T>*, T*, T*, T*, int64_t, \
                                         int64_t, const Queue&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
INSTANTIATE(f16)

}  // namespace trident
