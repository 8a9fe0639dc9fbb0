// Gated activations, RoPE and the two passes of the cross entropy on a GPU. Each reads its inputs once and writes once.

#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"

namespace trident {

namespace cuda {

namespace {

// ---- gated activations: blockIdx.x and threadIdx.x run along f, blockIdx.y and threadIdx.y along the rows

template <class W>
struct Gate {
    W value, slope;
};

// The activation and its derivative. x is multiplied last, so that minus infinity times a factor of 0 gives NaN as in
// torch.
template <int KIND, class W>
__device__ __forceinline__ Gate<W> gate_of(W x) {
    if constexpr (KIND == SILU) {
        const W sigmoid = W(1) / (W(1) + std::exp(-x));
        return {x * sigmoid, sigmoid * (W(1) + x * (W(1) - sigmoid))};
    } else if constexpr (KIND == GELU) {
        const W below = W(0.5) * (W(1) + std::erf(x * W(0.70710678118654752440)));
        return {x * below, below + x * W(0.39894228040143267794) * std::exp(W(-0.5) * x * x)};
    } else {
        constexpr W ROOT = W(0.79788456080286535588), CUBE = W(0.044715);
        const W bent = std::tanh(ROOT * (x + CUBE * x * x * x)), half = W(0.5) * (W(1) + bent);
        return {x * half, half + W(0.5) * x * (W(1) - bent * bent) * ROOT * (W(1) + W(3) * CUBE * x * x)};
    }
}

// Calls run(offset of a pack in [.., f], offset of its gate in [.., 2 f]) for every pack of this thread.
template <int N, class F>
__device__ __forceinline__ void each_pack(int64_t rows, int64_t f, F run) {
    for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows;
         row += int64_t(gridDim.y) * blockDim.y)
        for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < f;
             i += int64_t(gridDim.x) * blockDim.x * N)
            run(row * f + i, row * 2 * f + i);
}

template <class T, int N, int KIND>
__global__ void __launch_bounds__(BLOCK) gate_forward(const T* fused, T* y, int64_t rows, int64_t f) {
    each_pack<N>(rows, f, [=](int64_t to, int64_t from) {
        Pack<T, N> gate = load<N>(fused + from);
        const Pack<T, N> up = load<N>(fused + from + f);
#pragma unroll
        for (int j = 0; j < N; j++) gate.at[j] = narrow<T>(gate_of<KIND>(wide(gate.at[j])).value * wide(up.at[j]));
        store(y + to, gate);
    });
}

template <class T, int N, int KIND>
__global__ void __launch_bounds__(BLOCK)
    gate_backward(const T* grad, const T* fused, T* gfused, int64_t rows, int64_t f) {
    each_pack<N>(rows, f, [=](int64_t from, int64_t to) {
        const Pack<T, N> g = load<N>(grad + from);
        Pack<T, N> gate = load<N>(fused + to), up = load<N>(fused + to + f);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const auto [value, slope] = gate_of<KIND>(wide(gate.at[j]));
            gate.at[j] = narrow<T>(wide(g.at[j]) * wide(up.at[j]) * slope);
            up.at[j] = narrow<T>(wide(g.at[j]) * value);
        }
        store(gfused + to, gate);
        store(gfused + to + f, up);
    });
}

// Calls f(block, grid, pack size, kind) for rows of width f.
template <class T, class F>
void by_shape(bool packed, int kind, int64_t rows, int64_t f, F run) {
    if (rows == 0 || f == 0) return;
    by_pack<T>(packed, [&](auto n) {
        const int team = std::min(team_for(f / n, 1), BLOCK);
        const dim3 block(team, BLOCK / team);
        const int64_t across = (f / n + team - 1) / team, down = (rows + block.y - 1) / block.y;
        const dim3 grid(unsigned(std::min<int64_t>(across, 65535)), unsigned(std::min<int64_t>(down, 65535)));
        if (kind == SILU) return run(block, grid, n, std::integral_constant<int, SILU>());
        if (kind == GELU) return run(block, grid, n, std::integral_constant<int, GELU>());
        return run(block, grid, n, std::integral_constant<int, GELU_TANH>());
    });
}

// ---- RoPE: blockIdx.x is a position of a sample, threadIdx.y a head. Of a head, r / 2 pairs are rotated (in v:
// copied) and d - r single values are copied, both in packs.

template <class T>
struct Turn {
    T* fused;
    Heads<T> q, k, v;
    const T *cos, *sin;
    HeadShape x;
};

template <class T, int N, bool BACK>
__global__ void __launch_bounds__(BLOCK) turn(Turn<T> a) {
    using W = Wide<T>;
    const HeadShape x = a.x;
    const int64_t half = x.r / 2, turned = half / N, slots = turned + (x.d - x.r) / N, heads = x.n + 2 * x.m;
    for (int64_t row = blockIdx.x; row < x.s * x.b; row += gridDim.x) {
        const int64_t position = row / x.b, sample = row % x.b;
        for (int64_t slot = threadIdx.x; slot < slots; slot += blockDim.x) {
            Pack<T, N> cos, sin;
            if (slot < turned) {
                cos = load<N>(a.cos + position * half + slot * N);
                sin = load<N>(a.sin + position * half + slot * N);
            }
            for (int64_t head = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; head < heads;
                 head += int64_t(gridDim.y) * blockDim.y) {
                const bool in_q = head < x.n, in_v = head >= x.n + x.m;
                const Heads<T> part = in_q ? a.q : in_v ? a.v : a.k;
                const int64_t number = in_q ? head : in_v ? head - x.n - x.m : head - x.n;
                T* mine = part.p + sample * part.sample + number * part.head + position * part.position;
                T* packed = a.fused + (row * heads + head) * x.d;
                T *from = BACK ? mine : packed, *to = BACK ? packed : mine;
                if (slot >= turned) {
                    const int64_t i = x.r + (slot - turned) * N;
                    store(to + i, load<N>(from + i));
                    continue;
                }
                Pack<T, N> low = load<N>(from + slot * N), high = load<N>(from + half + slot * N);
                if (!in_v)
#pragma unroll
                    for (int j = 0; j < N; j++) {
                        const W l = wide(low.at[j]), h = wide(high.at[j]), c = wide(cos.at[j]);
                        const W s = BACK ? -wide(sin.at[j]) : wide(sin.at[j]);
                        low.at[j] = narrow<T>(l * c - h * s);
                        high.at[j] = narrow<T>(h * c + l * s);
                    }
                store(to + slot * N, low);
                store(to + half + slot * N, high);
            }
        }
    }
}

template <class T>
bool heads_pack(const Heads<T>& x) {
    return packs<T>(x.sample, x.p) && packs<T>(x.head) && packs<T>(x.position);
}

template <class T, bool BACK>
void run_turn(Turn<T> a, const Queue& queue) {
    const HeadShape x = a.x;
    const int64_t rows = x.s * x.b, heads = x.n + 2 * x.m, half = x.r / 2;
    if (rows == 0 || x.d == 0 || heads == 0) return;
    const bool packed =
        heads_pack(a.q) && heads_pack(a.k) && heads_pack(a.v) && packs<T>(half, a.fused, a.cos, a.sin) && packs<T>(x.d);
    by_pack<T>(packed, [&](auto n) {
        const int team = std::min(team_for((half + x.d - x.r) / n, 1), BLOCK);
        const dim3 block(team, BLOCK / team);
        const int64_t most = (heads + block.y - 1) / block.y;  // blocks along the heads, if there are too few positions
        const int64_t wanted = std::clamp<int64_t>(int64_t(processors()) * 8 / rows, 1, std::min<int64_t>(most, 65535));
        launch(turn<T, n, BACK>, dim3(unsigned(std::min<int64_t>(rows, 1 << 30)), unsigned(wanted)), block, 0,
               queue.stream, a);
    });
}

// ---- cross entropy: one team per row. Rows can start at any alignment, as vocabulary sizes may be odd, so the values
// before the first and after the last whole pack of a row are processed one by one.

template <class T>
struct Row {
    T* x;
    int64_t head, packs, tail, v;  // values before the packs; packs; start and end of the values after them

    __device__ Row(T* begin, int64_t count) : x(begin), v(count) {
        const int64_t off = int64_t(reinterpret_cast<uintptr_t>(begin) % 16 / sizeof(T));
        head = off ? FULL<T> - off : 0;
        head = head < v ? head : v;
        packs = (v - head) / FULL<T>;
        tail = head + packs * FULL<T>;
    }

    // Calls run(pack, index of its first value) for this thread's part. Several packs are loaded before the first is
    // used.
    template <class F>
    __device__ __forceinline__ void each(F run) const {
        constexpr int N = FULL<T>, AHEAD = 4;
        for (int64_t i = threadIdx.x; i < head; i += blockDim.x) one(i, run);
        for (int64_t i = threadIdx.x; i < packs; i += int64_t(AHEAD) * blockDim.x) {
            Pack<std::remove_const_t<T>, N> kept[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++)
                if (i + k * blockDim.x < packs) kept[k] = load<N>(x + head + (i + k * blockDim.x) * N);
#pragma unroll
            for (int k = 0; k < AHEAD; k++)
                if (i + k * blockDim.x < packs) run(kept[k], head + (i + k * blockDim.x) * N);
        }
        for (int64_t i = tail + threadIdx.x; i < v; i += blockDim.x) one(i, run);
    }

    template <class F>
    __device__ __forceinline__ void one(int64_t i, F run) const {
        Pack<std::remove_const_t<T>, 1> value = load<1>(x + i);
        run(value, i);
    }
};

// For logits: the error of __expf is 2 ulp near 0, and larger only for values so small that they do not affect a sum.
__device__ __forceinline__ float soft_exp(float x) { return __expf(x); }
__device__ __forceinline__ double soft_exp(double x) { return std::exp(x); }

template <class T>
__global__ void __launch_bounds__(TEAM_MAX)
    stats_of(const T* logits, const int64_t* target, Wide<T>* stats, int64_t rows, int64_t v, int64_t valid) {
    using W = Wide<T>;
    for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < rows; first += int64_t(gridDim.x) * blockDim.y) {
        const int64_t number = first + threadIdx.y;
        const bool there = number < rows;
        W peak = -INFINITY, sum = 0;  // online softmax: sum of exp(x - peak), with the peak so far
        if (there) {
            Row<const T>(logits + number * v, valid).each([&](const auto& values, int64_t) {
                constexpr int N = sizeof(values.at) / sizeof(T);
                W top = peak;
#pragma unroll
                for (int j = 0; j < N; j++) top = wide(values.at[j]) > top ? wide(values.at[j]) : top;
                if (top > peak) {
                    sum *= soft_exp(peak - top);  // a factor of 0 the first time
                    peak = top;
                }
                const W shift = peak == -INFINITY ? W(0) : peak;
#pragma unroll
                for (int j = 0; j < N; j++) sum += soft_exp(wide(values.at[j]) - shift);
            });
        }
        const W top = over_team(peak, [](W a, W b) { return a > b ? a : b; });
        sum = team_sum(peak == -INFINITY ? sum : sum * soft_exp(peak - top));
        if (there && threadIdx.x == 0) {
            const int64_t t = target[number];
            stats[number] = top;
            stats[rows + number] = sum;
            stats[2 * rows + number] = t >= 0 && t < valid ? wide(logits[number * v + t]) : W(0);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(TEAM_MAX)
    to_gradient(T* logits, const int64_t* target, const Wide<T>* peaks, const Wide<T>* scales, const Wide<T>* grads,
                int64_t rows, int64_t v, int64_t valid) {
    using W = Wide<T>;
    for (int64_t number = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; number < rows;
         number += int64_t(gridDim.x) * blockDim.y) {
        const W peak = peaks[number], scale = scales[number], grad = grads[number];
        const int64_t t = target[number];
        T* row = logits + number * v;
        Row<T>(row, v).each([&](auto& values, int64_t begin) {
            constexpr int N = sizeof(values.at) / sizeof(T);
#pragma unroll
            for (int j = 0; j < N; j++) {
                const W y = soft_exp(wide(values.at[j]) - peak) * scale;
                values.at[j] = narrow<T>(begin + j >= valid ? W(0) : begin + j == t ? y - grad : y);
            }
            store(row + begin, values);
        });
    }
}

}  // namespace

}  // namespace cuda

using namespace cuda;

template <class T>
void gated(const T* fused, T* y, int kind, int64_t rows, int64_t f, const Queue& queue) {
    by_shape<T>(packs<T>(f, fused, y), kind, rows, f, [&](dim3 block, dim3 grid, auto n, auto k) {
        launch(gate_forward<T, n, k>, grid, block, 0, queue.stream, fused, y, rows, f);
    });
}

template <class T>
void gated_backward(const T* grad, const T* fused, T* gfused, int kind, int64_t rows, int64_t f, const Queue& queue) {
    by_shape<T>(packs<T>(f, grad, fused, gfused), kind, rows, f, [&](dim3 block, dim3 grid, auto n, auto k) {
        launch(gate_backward<T, n, k>, grid, block, 0, queue.stream, grad, fused, gfused, rows, f);
    });
}

template <class T>
void rope(const T* fused, const T* cos, const T* sin, Heads<T> q, Heads<T> k, Heads<T> v, HeadShape shape,
          const Queue& queue) {
    run_turn<T, false>({const_cast<T*>(fused), q, k, v, cos, sin, shape}, queue);
}

template <class T>
void rope_backward(Heads<const T> q, Heads<const T> k, Heads<const T> v, const T* cos, const T* sin, T* fused,
                   HeadShape shape, const Queue& queue) {
    const auto plain = [](Heads<const T> x) { return Heads<T>{const_cast<T*>(x.p), x.sample, x.head, x.position}; };
    run_turn<T, true>({fused, plain(q), plain(k), plain(v), cos, sin, shape}, queue);
}

template <class T>
void softmax_stats(const T* logits, const int64_t* target, Wide<T>* stats, int64_t rows, int64_t v, int64_t valid,
                   const Queue& queue) {
    if (rows == 0) return;
    const dim3 block = block_of(team_for(valid / FULL<T>, 4));
    const unsigned blocks = unsigned(std::min<int64_t>((rows + block.y - 1) / block.y, 1 << 30));
    launch(stats_of<T>, blocks, block, TEAM_BYTES, queue.stream, logits, target, stats, rows, v, valid);
}

template <class T>
void softmax_gradient(T* logits, const int64_t* target, const Wide<T>* peak, const Wide<T>* scale, const Wide<T>* grad,
                      int64_t rows, int64_t v, int64_t valid, const Queue& queue) {
    if (rows == 0 || v == 0) return;
    const dim3 block = block_of(team_for(v / FULL<T>, 4));
    const unsigned blocks = unsigned(std::min<int64_t>((rows + block.y - 1) / block.y, 1 << 30));
    launch(to_gradient<T>, blocks, block, 0, queue.stream, logits, target, peak, scale, grad, rows, v, valid);
}

#define INSTANTIATE(T)                                                                                                \
    template void gated<T>(const T*, T*, int, int64_t, int64_t, const Queue&);                                        \
    template void gated_backward<T>(const T*, const T*, T*, int, int64_t, int64_t, const Queue&);                     \
    template void rope<T>(const T*, const T*, const T*, Heads<T>, Heads<T>, Heads<T>, HeadShape, const Queue&);       \
    template void rope_backward<T>(Heads<const T>, Heads<const T>, Heads<const T>, const T*, const T*, T*, HeadShape, \
                                   const Queue&);                                                                     \
    template void softmax_stats<T>(const T*, const int64_t*, Wide<T>*, int64_t, int64_t, int64_t, const Queue&);      \
    template void softmax_gradient<T>(T*, const int64_t*, const Wide<T>*, const Wide<T>*, const Wide<T>*, int64_t,    \
                                      int64_t, int64_t, const Queue&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
INSTANTIATE(f16)

}  // namespace trident
