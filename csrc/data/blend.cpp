// Source of each sample of a data blend; engine/data/samples/blend.py has the definition and the reference.

#include <functional>
#include <queue>

#include "data/index.h"

namespace {

constexpr int64_t MAX_TOTAL = int64_t(1) << 40;  // sum of weights; with MAX_BLOCK no product below reaches 2^63
constexpr int64_t MAX_BLOCK = int64_t(1) << 22;  // slots
constexpr int64_t MAX_SOURCES = int64_t(1) << 20;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }  // a >= 0, b > 0

using Due = std::pair<int64_t, int64_t>;  // (deadline, source)
using Heap = std::priority_queue<Due, std::vector<Due>, std::greater<Due>>;

struct BlockState {               // at a block boundary, global sample n
    std::vector<int64_t> counts;  // [K] samples of each source before n
    std::vector<int64_t> part;    // [K] n * weight mod total: progress of the open job, times total
    std::vector<char> ahead;      // [K] whether the open job is already done
};

BlockState state_at(const std::vector<int64_t>& weights, int64_t total, int64_t n) {
    const int64_t k = int64_t(weights.size());
    BlockState at{std::vector<int64_t>(k), std::vector<int64_t>(k), std::vector<char>(k)};
    std::vector<std::pair<int64_t, int64_t>> open_jobs;  // (-slots since its release, source)
    for (int64_t s = 0; s < k; ++s) {
        const auto scaled = static_cast<unsigned __int128>(n) * static_cast<unsigned __int128>(weights[s]);
        at.counts[s] = int64_t(scaled / uint64_t(total));
        at.part[s] = int64_t(scaled % uint64_t(total));
        if (at.part[s] > 0) open_jobs.emplace_back(-ceil_div(at.part[s], weights[s]), s);
    }
    std::sort(open_jobs.begin(), open_jobs.end());
    Heap candidates;
    int64_t sum = 0, chosen = 0;
    for (const auto& [release, s] : open_jobs) {
        candidates.emplace(ceil_div(total - at.part[s], weights[s]), s);
        sum += at.part[s];
        if (sum / total > chosen) {
            const int64_t next = candidates.top().second;
            candidates.pop();
            at.ahead[next] = 1;
            ++at.counts[next];
            ++chosen;
        }
    }
    return at;
}

// (counts int64 [K] before start, sources int32 [length], ordinals int32 [length]): slot i of the block is sample
// counts[sources[i]] + ordinals[i] of source sources[i].
py::tuple blend_block(const py::array& weight_array, int64_t start, int64_t length) {
    const View<int64_t> view(weight_array, "weights");
    if (view.size < 1 || view.size > MAX_SOURCES || length < 1 || length > MAX_BLOCK || start < 0 ||
        start > (MAX >> 1) - length)
        throw py::value_error("blend_block: expected 1 to 2^20 weights, 1 <= length <= 2^22, 0 <= start < 2^62");
    std::vector<int64_t> weights(view.size);
    int64_t total = 0;
    for (int64_t s = 0; s < view.size; ++s) {
        weights[s] = view[s];
        if (weights[s] < 1 || weights[s] > MAX_TOTAL - total)
            throw py::value_error("blend_block: weights have to be at least 1 and sum to at most 2^40");
        total += weights[s];
    }
    py::array_t<int64_t> counts(view.size);
    py::array_t<int32_t> sources(length), ordinals(length);
    int64_t* count_out = counts.mutable_data();
    int32_t *source_out = sources.mutable_data(), *ordinal_out = ordinals.mutable_data();
    {
        py::gil_scoped_release release_gil;
        const BlockState first = state_at(weights, total, start), last = state_at(weights, total, start + length);
        const int64_t k = view.size;
        // linked lists of the sources whose next job is released at a slot
        std::vector<int64_t> head(length, -1), next(k, -1), done(k, 0);
        const auto release_next = [&](int64_t s, int64_t not_before) {  // the next job of source s, if it has one
            if (first.counts[s] + done[s] >= last.counts[s]) return;
            const int64_t job = first.ahead[s] + done[s], reached = job * total - first.part[s];
            const int64_t slot = std::max(not_before, reached > 0 ? reached / weights[s] : 0);
            if (slot >= length) throw py::value_error("blend_block: a share is too small for this block length");
            next[s] = head[slot];
            head[slot] = s;
        };
        for (int64_t s = 0; s < k; ++s) {
            count_out[s] = first.counts[s];
            release_next(s, 0);
        }
        Heap waiting;
        for (int64_t i = 0; i < length; ++i) {
            for (int64_t s = head[i]; s >= 0; s = next[s]) {
                const int64_t end = (first.ahead[s] + done[s] + 1) * total - first.part[s];
                waiting.emplace(std::min(ceil_div(end, weights[s]), length), s);
            }
            if (waiting.empty() || waiting.top().first <= i)
                throw py::value_error("blend_block: a share is too small for this block length");
            const int64_t s = waiting.top().second;
            waiting.pop();
            source_out[i] = int32_t(s);
            ordinal_out[i] = int32_t(done[s]++);
            release_next(s, i + 1);
        }
    }
    return py::make_tuple(counts, sources, ordinals);
}

}  // namespace

void bind_blend(py::module_& m) {
    m.def("blend_block", &blend_block, py::arg("weights"), py::arg("start"), py::arg("length"));
}
