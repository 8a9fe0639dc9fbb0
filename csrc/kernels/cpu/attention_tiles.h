// Causal attention in float32 on tiles of tile.h, forward and backward (the recomputing backward of Dao et al. 2022).
//
// One task is one sample and one KV head. Its query heads are processed in sequence, so that with grouped queries the
// gradients of k and v are summed in one place and k and v are never repeated. Queries are processed in blocks of rows:
// few enough rows that a block's scores over all keys stay in L2, and enough that the keys are not re-read too often.
// Tiles beyond the diagonal are skipped, and so are tiles before the first key that a row attends
// to: the start of its document, or of its sliding window. The sums of a row run over the keys in order, so results do
// not depend on threads or on other samples.
//
// Dropout multiplies the weights, after the softmax, by a keyed mask (draws.h) of a row at a time, drawn again in the
// backward. The log-sum-exp is of all scores, and a row's sum of weight x gradient of the weight stays grad . out.
#pragma once

#include <vector>

#include "kernels/cpu/exp.h"
#include "kernels/cpu/tile.h"
#include "kernels/cpu/words.h"

namespace trident::TILES {

namespace {

constexpr int64_t SCORES = 64 * 1024;  // floats of scores per block, unless that gives fewer than
constexpr int64_t ROWS = 192;          // rows per block: with 12, a backward over 8,192 keys takes 2.5 times as long

int64_t up(int64_t x, int64_t unit) { return ceil_div(x, unit) * unit; }

// The first key that each row of a sample attends to; non-decreasing.
struct Begin {
    const int64_t* p;
    int64_t operator[](int64_t row) const { return p ? p[row] : 0; }
};

// Sizes and strides of one call. ld, dd: number of keys and d, rounded up to whole tiles; rows: per block of queries;
// before: positions before the first query.
struct Plan {
    AttentionShape x;
    int64_t ld, dd, before, rows;
    float scale;
    WeightDropout dropout;
    explicit Plan(AttentionShape shape, double s, WeightDropout how)
        : x(shape), ld(up(shape.keys, NR)), dd(up(shape.d, NR)), before(shape.keys - shape.s), scale(float(s)),
          dropout(how) {
        rows = std::min(up(x.s, MR), std::max(ROWS, SCORES / ld) / MR * MR);
    }
    // The end of the keys that any of the first `rows` rows attends to.
    int64_t seen(int64_t rows) const { return std::min(x.keys, before + rows); }
    // The places of a head's weights, by row; null without dropout.
    const int64_t* places(int64_t sample, int64_t head) const {
        return dropout.places ? dropout.places + (sample * x.n + head) * x.s : nullptr;
    }
};

// Scratch buffers of one thread, by slot, reused across calls.
struct Scratch {
    std::vector<Buffer> buffers;
    std::vector<int64_t> sizes;
    float* get(size_t slot, int64_t count) {
        if (buffers.size() <= slot) buffers.resize(slot + 1), sizes.resize(slot + 1, 0);
        if (sizes[slot] < count) buffers[slot] = allocate(count), sizes[slot] = count;
        return buffers[slot].get();
    }
};

enum Slot : size_t { SCORE, SLOPE, KEYS, VALUES, KEYS_BY_D, QUERY, GRAD, ROW, QUERY_BY_D, GRAD_BY_D, KEPT };

// kept[key] = what dropout multiplies the weight by, 0 or its scale, for keys [begin, end) of a row.
// Before the target of the tiles: inlined there, and vectorised for it.
INLINE void draw_kept(const WeightDropout& how, int64_t place, int64_t begin, int64_t end, float* kept) {
    draws::over_words(how.key, uint64_t(place + begin), end - begin,
                      [&](const uint32_t* words, int64_t i, int64_t count) INLINE_CALL {
#pragma omp simd
                          for (int64_t j = 0; j < count; j++)
                              kept[begin + i + j] = words[j] >= how.threshold ? how.scale : 0.0f;
                      });
}

TILE_TARGET_BEGIN

// Packs `lines` positions of x as the left (W = MR) or right (W = NR) operand of a matmul that sums over d.
template <int64_t W>
void pack_over_d(Heads<const float> x, int64_t first, int64_t lines, int64_t d, float* to) {
    pack<W>(x.p + first * x.position, x.position, 1, lines, d, to);
}

// Packs the right operand of a matmul that sums over positions: panels [d / NR][count][NR].
void pack_over_positions(Heads<const float> x, int64_t first, int64_t count, int64_t d, float* to) {
    pack<NR>(x.p + first * x.position, 1, x.position, d, count, to);
}

// out[MR i .. ][keys] = a b for the keys that each panel of rows attends to, from the start of a whole tile.
void scores(const Plan& plan, Begin begin, int64_t q0, int64_t rows, const float* a, const float* b, float* out) {
    const int64_t d = plan.x.d;
    for (int64_t i = 0; i < rows; i += MR) {
        const int64_t seen = plan.seen(q0 + i + MR);
        for (int64_t j = begin[q0 + i] / NR * NR; j < seen; j += NR)
            tile(d, a + i * d, MR, b + j * d, out + i * plan.ld + j, plan.ld, false);
    }
}

// For the row of position p: scores -> exp(scale (x - max)) at keys [begin, p], zeros in the rest of [low, end).
// Returns the sum of the exponentials; *peak = scale * max.
float exponentials(float* x, int64_t low, int64_t begin, int64_t p, int64_t end, float scale, float* peak) {
    float top = x[begin], sum = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = begin; i <= p; i++) top = x[i] > top ? x[i] : top;
    const float shift = top == -INFINITY ? 0.0f : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i <= p; i++) {
        const float e = exp_of((x[i] - shift) * scale);
        x[i] = e;
        sum += e;
    }
    std::fill(x + low, x + begin, 0.0f);
    std::fill(x + p + 1, x + end, 0.0f);
    *peak = top * scale;
    return sum;
}

// x[begin .. end) *= by[begin .. end)
void multiply(float* x, const float* by, int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; i++) x[i] *= by[i];
}

void forward_head(const Plan& plan, Begin begin, const int64_t* places, Heads<const float> q, const float* keys,
                  const float* values, float* out, int64_t out_row, float* lse, Scratch& space) {
    const int64_t s = plan.x.s, keys_count = plan.x.keys, d = plan.x.d, ld = plan.ld;
    float* score = space.get(SCORE, plan.rows * ld);
    float* query = space.get(QUERY, plan.rows * d + 2);
    float *left = space.get(ROW, MR * ld + 2), *kept = places ? space.get(KEPT, ld) : nullptr;
    float inverse[MR];
    alignas(64) float part[MR * NR];
    for (int64_t q0 = 0; q0 < s; q0 += plan.rows) {
        const int64_t rows = std::min(plan.rows, s - q0);
        pack_over_d<MR>(q, q0, rows, d, query);
        scores(plan, begin, q0, rows, query, keys, score);
        for (int64_t i = 0; i < rows; i += MR) {
            const int64_t count = std::min(MR, rows - i), seen = plan.seen(q0 + i + MR), low = begin[q0 + i];
            for (int64_t r = 0; r < count; r++) {
                const int64_t row = q0 + i + r;
                float peak;
                const float sum =
                    exponentials(score + (i + r) * ld, low, begin[row], plan.before + row, seen, plan.scale, &peak);
                lse[row] = peak + std::log(sum);
                inverse[r] = 1.0f / sum;
                if (kept) {
                    draw_kept(plan.dropout, places[row], begin[row], plan.before + row + 1, kept);
                    multiply(score + (i + r) * ld, kept, begin[row], plan.before + row + 1);
                }
            }
            pack<MR>(score + i * ld + low, ld, 1, count, seen - low, left);
            for (int64_t c = 0; c < d; c += NR) {
                tile(seen - low, left, MR, values + c * keys_count + low * NR, part, NR, false);
                const int64_t width = std::min(NR, d - c);
                for (int64_t r = 0; r < count; r++)
                    for (int64_t j = 0; j < width; j++)
                        out[(q0 + i + r) * out_row + c + j] = part[r * NR + j] * inverse[r];
            }
        }
    }
}

// For one row that attends to keys [begin, position]: p from scores to the weights of the values, g from gradients of
// those weights to gradients of the scores; zeros in the rest of [low, end). kept: of draw_kept; null: no dropout.
void slopes(float* p, float* g, const float* kept, int64_t low, int64_t begin, int64_t position, int64_t end,
            float scale, float lse, float delta) {
    if (kept) multiply(g, kept, begin, position + 1);
#pragma omp simd
    for (int64_t i = begin; i <= position; i++) {
        const float e = exp_of(p[i] * scale - lse);
        p[i] = e;
        g[i] = e * (g[i] - delta) * scale;
    }
    if (kept) multiply(p, kept, begin, position + 1);
    for (float* x : {p, g}) {
        std::fill(x + low, x + begin, 0.0f);
        std::fill(x + position + 1, x + end, 0.0f);
    }
}

// to[key] += sum over the block's rows of a[row][key] b[row], for all keys that any row attends to.
void add_by_keys(const Plan& plan, Begin begin, int64_t q0, int64_t rows, const float* a, const float* b,
                 Heads<float> to) {
    const int64_t d = plan.x.d, seen = plan.seen(q0 + rows), p0 = plan.before + q0;
    int64_t last = 0;  // rows from here on attend only to keys after j's tile
    for (int64_t j = begin[q0] / MR * MR; j < seen; j += MR) {
        const int64_t first = std::max<int64_t>(0, (j - p0) / MR * MR);  // rows before it do not attend to key j
        while (last < rows && begin[q0 + last] < j + MR) last++;
        if (last <= first) continue;
        for (int64_t c = 0; c < d; c += NR)
            tile_part(last - first, a + first * plan.ld + j, plan.ld, b + c * rows + first * NR,
                      to.p + j * to.position + c, to.position, true, std::min(MR, plan.x.keys - j), d - c);
    }
}

void backward_head(const Plan& plan, Begin begin, const int64_t* places, Heads<const float> q, Heads<const float> grad,
                   const float* out, int64_t out_row, const float* lse, const float* keys, const float* values,
                   const float* keys_by_d, Heads<float> gq, Heads<float> gk, Heads<float> gv, Scratch& space) {
    const int64_t s = plan.x.s, keys_count = plan.x.keys, d = plan.x.d, ld = plan.ld;
    float *score = space.get(SCORE, plan.rows * ld + MR), *slope = space.get(SLOPE, plan.rows * ld + MR);
    float *query = space.get(QUERY, plan.rows * d + 2), *gradient = space.get(GRAD, plan.rows * d + 2);
    float* query_by_d = space.get(QUERY_BY_D, plan.rows * plan.dd);
    float *grad_by_d = space.get(GRAD_BY_D, plan.rows * plan.dd), *left = space.get(ROW, MR * ld + 2);
    float* kept = places ? space.get(KEPT, ld) : nullptr;
    for (int64_t q0 = 0; q0 < s; q0 += plan.rows) {
        const int64_t rows = std::min(plan.rows, s - q0);
        pack_over_d<MR>(q, q0, rows, d, query);
        pack_over_d<MR>(grad, q0, rows, d, gradient);
        pack_over_positions(q, q0, rows, d, query_by_d);
        pack_over_positions(grad, q0, rows, d, grad_by_d);
        scores(plan, begin, q0, rows, query, keys, score);
        scores(plan, begin, q0, rows, gradient, values, slope);
        const int64_t last = plan.seen(q0 + rows);
        for (int64_t i = 0; i < rows; i += MR) {
            const int64_t count = std::min(MR, rows - i), seen = plan.seen(q0 + i + MR), low = begin[q0 + i];
            for (int64_t r = 0; r < count; r++) {
                const int64_t row = q0 + i + r;
                const float *g = grad.p + row * grad.position, *o = out + row * out_row;
                float delta = 0;
#pragma omp simd reduction(+ : delta)
                for (int64_t c = 0; c < d; c++) delta += g[c] * o[c];
                // zero from the start of a whole tile, because add_by_keys reads whole tiles of keys
                const int64_t from = std::min(low, begin[row] / MR * MR);
                const int64_t end = std::min(up(std::min(last, plan.seen(q0 + i + MR)), MR), ld);
                if (kept) draw_kept(plan.dropout, places[row], begin[row], plan.before + row + 1, kept);
                slopes(score + (i + r) * ld, slope + (i + r) * ld, kept, from, begin[row], plan.before + row, end,
                       plan.scale, lse[row], delta);
            }
            pack<MR>(slope + i * ld + low, ld, 1, count, seen - low, left);
            for (int64_t c = 0; c < d; c += NR)
                tile_part(seen - low, left, MR, keys_by_d + c * keys_count + low * NR,
                          gq.p + (q0 + i) * gq.position + c, gq.position, false, count, d - c);
        }
        add_by_keys(plan, begin, q0, rows, score, grad_by_d, gv);
        add_by_keys(plan, begin, q0, rows, slope, query_by_d, gk);
    }
}

TILE_TARGET_END

template <class T>
Heads<T> at(Heads<T> x, int64_t sample, int64_t head) {
    return {x.p + sample * x.sample + head * x.head, x.sample, x.head, x.position};
}

Begin first_keys(const int64_t* begin, AttentionShape x, int64_t sample) {
    return {begin ? begin + sample * x.s : begin};
}

Scratch& scratch() {
    static thread_local Scratch space;
    return space;
}

}  // namespace

void attention(Heads<const float> q, Heads<const float> k, Heads<const float> v, const int64_t* begin, float* out,
               float* lse, AttentionShape x, double scale, WeightDropout dropout, int threads) {
    const Plan plan(x, scale, dropout);
    const int64_t tasks = x.b * x.m, group = x.n / x.m, out_row = x.b * x.n * x.d;
#pragma omp parallel for num_threads(int(std::min<int64_t>(threads, tasks))) schedule(dynamic, 1) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t sample = task / x.m, j = task % x.m;
        Scratch& space = scratch();
        float *keys = space.get(KEYS, plan.ld * x.d + 2), *values = space.get(VALUES, plan.dd * x.keys);
        pack_over_d<NR>(at(k, sample, j), 0, x.keys, x.d, keys);
        pack_over_positions(at(v, sample, j), 0, x.keys, x.d, values);
        for (int64_t h = j * group; h < (j + 1) * group; h++)
            forward_head(plan, first_keys(begin, x, sample), plan.places(sample, h), at(q, sample, h), keys, values,
                         out + (sample * x.n + h) * x.d, out_row, lse + (sample * x.n + h) * x.s, space);
    }
}

void attention_backward(Heads<const float> grad, Heads<const float> q, Heads<const float> k, Heads<const float> v,
                        const int64_t* begin, const float* out, const float* lse, Heads<float> gq, Heads<float> gk,
                        Heads<float> gv, AttentionShape x, double scale, WeightDropout dropout, int threads) {
    const Plan plan(x, scale, dropout);
    const int64_t tasks = x.b * x.m, group = x.n / x.m, out_row = x.b * x.n * x.d;
#pragma omp parallel for num_threads(int(std::min<int64_t>(threads, tasks))) schedule(dynamic, 1) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t sample = task / x.m, j = task % x.m;
        Scratch& space = scratch();
        float *keys = space.get(KEYS, plan.ld * x.d + 2), *values = space.get(VALUES, plan.ld * x.d + 2);
        float* keys_by_d = space.get(KEYS_BY_D, plan.dd * x.keys);
        pack_over_d<NR>(at(k, sample, j), 0, x.keys, x.d, keys);
        pack_over_d<NR>(at(v, sample, j), 0, x.keys, x.d, values);
        pack_over_positions(at(k, sample, j), 0, x.keys, x.d, keys_by_d);
        const Heads<float> to_k = at(gk, sample, j), to_v = at(gv, sample, j);
        for (int64_t p = 0; p < x.keys; p++) {
            std::memset(to_k.p + p * to_k.position, 0, size_t(x.d) * sizeof(float));
            std::memset(to_v.p + p * to_v.position, 0, size_t(x.d) * sizeof(float));
        }
        for (int64_t h = j * group; h < (j + 1) * group; h++)
            backward_head(plan, first_keys(begin, x, sample), plan.places(sample, h), at(q, sample, h),
                          at(grad, sample, h), out + (sample * x.n + h) * x.d, out_row, lse + (sample * x.n + h) * x.s,
                          keys, values, keys_by_d, at(gq, sample, h), to_k, to_v, space);
    }
}

}  // namespace trident::TILES
