// Every CPU kernel on random shapes, for the sanitizers (tests/csrc/test_sanitized.py). Each tensor is a heap block of
// its exact size, so that accesses outside it are detected. Outputs start as NaN and must be written completely. GEMM
// and attention run on all tiles that this processor supports, and the results must agree.
//
//     ops_driver ROUNDS

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels/cpu/tiles.h"

using namespace trident;

namespace {

std::mt19937 source(7);
int threads = 1;

int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(source); }

float number() { return std::normal_distribution<float>()(source); }

float read(float x) { return x; }
float read(double x) { return float(x); }
float read(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
float read(f16 x) { return float(__builtin_bit_cast(_Float16, x.bits)); }

void write(float& to, float x) { to = x; }
void write(double& to, float x) { to = x; }
void write(bf16& to, float x) { to.bits = uint16_t(__builtin_bit_cast(uint32_t, x) >> 16); }
void write(f16& to, float x) { to.bits = __builtin_bit_cast(uint16_t, _Float16(x)); }

template <class T>
std::vector<T> draw(int64_t n) {
    std::vector<T> values(static_cast<size_t>(n));
    for (T& x : values) write(x, number());
    return values;
}

// An output filled with NaN; `check` later requires that every value was written.
template <class T>
std::vector<T> output(int64_t n) {
    std::vector<T> values(static_cast<size_t>(n));
    for (T& x : values) write(x, NAN);
    return values;
}

template <class T>
void check(const std::vector<T>& values, const char* what) {
    for (const T& x : values)
        if (!(std::abs(read(x)) < INFINITY))
            std::fprintf(stderr, "%s is not all written, or not finite\n", what), std::abort();
}

// [b, heads, s, d] as a view in one of three layouts, in a block that ends with the last value.
template <class T>
struct View {
    std::vector<T> values;
    Heads<T> heads;
};

template <class T>
View<T> view(bool fill, int64_t b, int64_t n, int64_t s, int64_t d) {
    View<T> x{fill ? draw<T>(b * n * s * d) : output<T>(b * n * s * d), {}};
    T* p = x.values.data();
    const int64_t kind = pick(0, 2);
    if (kind == 0) x.heads = {p, n * s * d, s * d, d};
    if (kind == 1) x.heads = {p, s * n * d, d, n * d};
    if (kind == 2) x.heads = {p, n * d, d, b * n * d};
    return x;
}

template <class T>
View<T> again(const View<T>& x) {
    View<T> y = x;
    y.heads.p = y.values.data();
    return y;
}

template <class T>
Heads<const T> constant(const View<T>& x) {
    return {x.heads.p, x.heads.sample, x.heads.head, x.heads.position};
}

template <class T>
void norms() {
    using W = Wide<T>;
    const int64_t rows = pick(0, 4) ? pick(0, 200) : 0, h = pick(1, 130), n = rows * h;
    const auto x = draw<T>(n), r = draw<T>(n), w = draw<T>(h), b = draw<T>(h), g = draw<T>(n), more = draw<T>(n);
    const bool added = pick(0, 1), passed = pick(0, 1);
    auto sum = output<T>(added ? n : 0), y = output<T>(n), gx = output<T>(n), gw = output<T>(h), gb = output<T>(h);
    auto scale = output<W>(rows), stats = output<W>(2 * rows);
    const T *residual = added ? r.data() : nullptr, *extra = passed ? more.data() : nullptr;
    const double offset = double(pick(0, 1));
    rms_norm<T>(x.data(), residual, sum.data(), w.data(), y.data(), scale.data(), rows, h, 1e-5, offset, threads);
    const auto rms_in = added ? sum : x;
    rms_norm_backward<T>(g.data(), extra, rms_in.data(), w.data(), scale.data(), gx.data(), gw.data(), rows, h, offset,
                         threads);
    check(sum, "sum"), check(y, "y of RMSNorm"), check(gx, "gx"), check(gw, "gw");
    y = output<T>(n), gx = output<T>(n), gw = output<T>(h), sum = output<T>(added ? n : 0);
    layer_norm<T>(x.data(), residual, sum.data(), w.data(), b.data(), y.data(), stats.data(), rows, h, 1e-5, threads);
    const auto layer_in = added ? sum : x;
    layer_norm_backward<T>(g.data(), extra, layer_in.data(), w.data(), stats.data(), gx.data(), gw.data(), gb.data(),
                           rows, h, threads);
    check(sum, "sum"), check(y, "y of LayerNorm"), check(gx, "gx"), check(gw, "gw"), check(gb, "gb");
}

template <class T>
void gated_and_loss() {
    using W = Wide<T>;
    const int64_t rows = pick(0, 60), f = pick(1, 150), v = pick(1, 3000), valid = pick(0, v), tokens = pick(0, 12);
    const auto fused = draw<T>(2 * rows * f), g = draw<T>(rows * f);
    for (int kind = 0; kind < KINDS; kind++) {
        auto y = output<T>(rows * f), gx = output<T>(2 * rows * f);
        gated<T>(fused.data(), y.data(), kind, rows, f, threads);
        gated_backward<T>(g.data(), fused.data(), gx.data(), kind, rows, f, threads);
        check(y, "gated"), check(gx, "gradient of gated");
    }
    auto logits = draw<T>(tokens * v);
    std::vector<int64_t> target(static_cast<size_t>(tokens));
    for (int64_t& t : target) t = pick(-3, v + 3);
    std::vector<W> stats(static_cast<size_t>(3 * tokens), W(1)), one(static_cast<size_t>(tokens), W(1));
    softmax_stats<T>(logits.data(), target.data(), stats.data(), tokens, v, valid, threads);
    if (valid > 0) check(stats, "stats");
    softmax_gradient<T>(logits.data(), target.data(), one.data(), one.data(), one.data(), tokens, v, valid, threads);
    check(logits, "gradient of the logits");
}

template <class T>
void rotations() {
    const int64_t s = pick(1, 40), b = pick(1, 3), m = pick(1, 3), n = m * pick(1, 3), d = 2 * pick(1, 20);
    const int64_t half = pick(0, d / 2);
    const auto fused = draw<T>(s * b * (n + 2 * m) * d), cos = draw<T>(s * half), sin = draw<T>(s * half);
    auto q = view<T>(false, b, n, s, d), k = view<T>(false, b, m, s, d), v = view<T>(false, b, m, s, d);
    auto back = output<T>(s * b * (n + 2 * m) * d);
    const HeadShape shape{s, b, n, m, d, 2 * half};
    rope<T>(fused.data(), cos.data(), sin.data(), q.heads, k.heads, v.heads, shape, threads);
    check(q.values, "q"), check(k.values, "k"), check(v.values, "v");
    rope_backward<T>(constant(q), constant(k), constant(v), cos.data(), sin.data(), back.data(), shape, threads);
    check(back, "gradient of q|k|v");
}

template <class W, class T>
void optimizer(bool low) {
    const int64_t n = pick(0, 20'000);
    auto p = draw<W>(n), g = draw<W>(n), m = draw<W>(n), v = draw<W>(n);
    for (W& x : v) x = std::abs(x);
    auto values = output<T>(low ? n : 0);
    adamw<W, T>(p.data(), g.data(), m.data(), v.data(), low ? values.data() : nullptr, n,
                {1e-3, 0.9, 0.95, 1e-8, 0.1, 0.5, pick(1, 9)}, threads);
    check(p, "masters"), check(values, "values");
}

template <class T>
void squares() {
    const int64_t n = pick(0, 40'000), k = pick(0, 9);
    const auto x = draw<T>(n);
    std::vector<int64_t> bounds;
    for (int64_t i = 0; i < k; i++) bounds.push_back(pick(0, n)), bounds.push_back(pick(bounds.back(), n));
    auto out = output<double>(k);
    sum_squares<T>(x.data(), int64_t(x.size()), bounds.data(), out.data(), k, threads);
    check(out, "sums of squares");
}

template <class T>
void drops(int64_t rows, int64_t n, const int64_t* starts, DrawKey key) {
    const auto x = draw<T>(rows * n);
    auto y = output<T>(rows * n);
    dropout<T>(x.data(), starts, rows, n, key, 1u << 30, 1.5, y.data(), threads);
    check(y, "dropout");
}

void draws() {
    const int64_t rows = pick(0, 9), n = pick(0, 3) ? pick(0, 300) : pick(9000, 20'000);
    std::vector<int64_t> starts;
    for (int64_t i = 0; i < rows; i++) starts.push_back(pick(0, 3) ? pick(0, 500) : INT64_MAX - 40'000);
    const DrawKey key{uint64_t(pick(INT64_MIN, INT64_MAX)), uint64_t(pick(0, 9))};
    for (const int kind : {UNIFORM, NORMAL}) {
        auto out = output<float>(rows * n);
        trident::draw(starts.data(), rows, n, key, kind, 0, out.data(), threads);
        check(out, "draws");
    }
    std::vector<uint32_t> bits(size_t(rows * n));
    std::vector<unsigned char> kept(size_t(rows * n), 2);
    trident::draw(starts.data(), rows, n, key, BITS, 0, bits.data(), threads);
    trident::draw(starts.data(), rows, n, key, KEEP, 1u << 30, kept.data(), threads);
    for (size_t i = 0; i < bits.size(); i++)
        if (kept[i] != (bits[i] >= 1u << 30)) std::fprintf(stderr, "a mask is not that of its bits\n"), std::abort();
    drops<float>(rows, n, starts.data(), key), drops<double>(rows, n, starts.data(), key);
    drops<bf16>(rows, n, starts.data(), key), drops<f16>(rows, n, starts.data(), key);
}

// The tiles that this processor supports.
std::vector<const Tiles*> all_tiles() {
    std::vector<const Tiles*> found;
    for (const Tiles* tiles : {avx512_tiles(), avx2_tiles()})
        if (tiles) found.push_back(tiles);
    return found;
}

// Compares values of about 1 from two kinds of tiles, which add in the same order but may round differently (FMA).
void same(const std::vector<float>& values, const std::vector<float>& first, const char* what) {
    for (size_t i = 0; i < values.size(); i++)
        if (!(std::abs(values[i] - first[i]) <= 1e-3f * (1 + std::abs(first[i]))))
            std::fprintf(stderr, "%s depends on the tiles\n", what), std::abort();
}

void attentions() {
    const int64_t b = pick(1, 2), m = pick(1, 2), n = m * pick(1, 3), s = pick(0, 3) ? pick(1, 90) : pick(500, 640);
    const int64_t d = pick(1, 80), before = pick(0, 1) ? pick(0, 100) : 0, keys = before + s;
    const auto q = view<float>(true, b, n, s, d);
    const auto k = view<float>(true, b, m, keys, d), v = view<float>(true, b, m, keys, d);
    const auto empty_q = view<float>(false, b, n, s, d), empty_k = view<float>(false, b, m, keys, d);
    std::vector<int64_t> begin;
    for (int64_t i = 0; i < b * s; i++)
        begin.push_back(i % s == 0 ? pick(0, before) : pick(0, 7) ? begin.back() : pick(begin.back(), before + i % s));
    const int64_t* documents = pick(0, 2) ? begin.data() : nullptr;
    const auto grad = draw<float>(s * b * n * d);
    const AttentionShape shape{s, keys, b, n, m, d};
    std::vector<int64_t> places;
    for (int64_t i = 0; i < b * n * s; i++) places.push_back(pick(0, int64_t(1) << 40));
    const WeightDropout dropout{pick(0, 1) ? places.data() : nullptr, {3, 4}, uint32_t(1) << 30, 1.5f};
    std::vector<std::vector<float>> first;
    for (const Tiles* tiles : all_tiles()) {
        auto gq = again(empty_q), gk = again(empty_k), gv = again(empty_k);
        auto out = output<float>(s * b * n * d), lse = output<float>(b * n * s);
        tiles->forward(constant(q), constant(k), constant(v), documents, out.data(), lse.data(), shape, 0.3, dropout,
                       threads);
        check(out, "attention"), check(lse, "lse");
        tiles->backward({grad.data(), n * d, d, b * n * d}, constant(q), constant(k), constant(v), documents,
                        out.data(), lse.data(), gq.heads, gk.heads, gv.heads, shape, 0.3, dropout, threads);
        check(gq.values, "gradient of q"), check(gk.values, "gradient of k"), check(gv.values, "gradient of v");
        if (first.empty()) first = {out, gq.values, gk.values, gv.values};
        same(out, first[0], "attention"), same(gq.values, first[1], "gradient of q");
        same(gk.values, first[2], "gradient of k"), same(gv.values, first[3], "gradient of v");
    }
}

void gemms() {
    const int64_t m = pick(0, 90), n = pick(0, 90), k = pick(0, 3) ? pick(0, 90) : pick(500, 1100),
                  ldc = n + pick(0, 5);
    const auto a = draw<float>(m * k), b = draw<float>(k * n);
    const bool across = pick(0, 1), down = pick(0, 1), add = pick(0, 1);
    const auto before = add ? draw<float>(m * ldc) : output<float>(m * ldc);
    for (const Tiles* tiles : all_tiles()) {
        auto c = before;
        tiles->gemm(m, n, k, {a.data(), across ? 1 : k, across ? m : 1}, {b.data(), down ? 1 : n, down ? k : 1},
                    c.data(), ldc, add, threads);
        for (int64_t i = 0; i < m; i++) {
            std::vector<float> row(c.begin() + i * ldc, c.begin() + i * ldc + n), plain;
            for (int64_t j = 0; j < n; j++) {
                double sum = add ? before[size_t(i * ldc + j)] : 0.0;
                for (int64_t p = 0; p < k; p++)
                    sum += double(a[size_t(across ? p * m + i : i * k + p)]) * b[size_t(down ? j * k + p : p * n + j)];
                plain.push_back(float(sum));
            }
            check(row, "gemm"), same(row, plain, "gemm");
        }
    }
}

}  // namespace

int main(int, char** words) {
    const int rounds = std::atoi(words[1]);
    for (int round = 0; round < rounds; round++) {
        threads = 1 + round % 3;
        norms<float>(), norms<double>(), norms<bf16>(), norms<f16>();
        gated_and_loss<float>(), gated_and_loss<double>(), gated_and_loss<bf16>(), gated_and_loss<f16>();
        rotations<float>(), rotations<double>(), rotations<bf16>(), rotations<f16>();
        optimizer<float, float>(false), optimizer<double, double>(false);
        optimizer<float, bf16>(true), optimizer<float, f16>(true);
        squares<float>(), squares<double>(), squares<bf16>(), squares<f16>();
        draws(), attentions(), gemms();
    }
    std::printf("%d rounds", rounds);
    for (const Tiles* tiles : all_tiles()) std::printf(", %s", tiles->name);
    std::printf("\n");
}
