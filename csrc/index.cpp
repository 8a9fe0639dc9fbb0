// The hot half of engine/data/order.py (keyed permutation, block prefix sums, batch gather), engine/data/blend.py
// (whose turn it is) and engine/data/pack.py (what is written). No torch.
//
// The definitions, and why they are what they are, stand in those files; the Python code there is the reference and
// tests hold the two equal bit by bit. Here it is only fast, and safe: no input, however wrong, makes it
// read outside the arrays it was given. Arrays are taken as they are (never converted: a conversion would copy a
// memory-mapped index of gigabytes) and loaded bytewise, because the .idx header leaves them unaligned.
//
// Wrong shapes or dtypes raise ValueError, numbers that lead outside raise IndexError. The GIL is released in all loops.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>
#include <queue>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
constexpr int kRounds = 8;  // even: two are done at a time
constexpr int kTableHalf = 5;  // 2 * 5 bits hold a block of documents
constexpr int64_t kMax = std::numeric_limits<int64_t>::max();

inline uint64_t mix64(uint64_t z) {  // the finaliser of splitmix64
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

inline uint64_t derive(uint64_t key, uint64_t word) { return mix64(key ^ mix64(word + kGolden)); }

// Balanced Feistel network over the smallest domain of 2 * half bits that holds [0, n), with cycle walking.
struct Permutation {
  uint64_t n, mask, keys[kRounds];
  int half = 1;
  bool tabled = false;
  uint8_t table[kRounds][1 << kTableHalf];  // what a round adds: 256 mixes instead of 8 for each document of a block

  Permutation(uint64_t count, uint64_t key, bool many = false) : n(count) {
    while (half < 32 && (1ull << (2 * half)) < n) ++half;
    mask = (1ull << half) - 1;
    for (int r = 0; r < kRounds; ++r) keys[r] = mix64(key + uint64_t(r + 1) * kGolden);
    tabled = many && half <= kTableHalf;
    if (tabled)
      for (int r = 0; r < kRounds; ++r)
        for (uint64_t right = 0; right <= mask; ++right) table[r][right] = uint8_t(mix64(right + keys[r]) & mask);
  }

  uint64_t operator()(uint64_t x) const {  // x < n, which cycle walking keeps true; terminates as it is a bijection
    if (n == 1) return 0;
    do {
      uint64_t left = x >> half, right = x & mask;
      if (tabled) {
        for (int r = 0; r < kRounds; r += 2) {
          left ^= table[r][right];
          right ^= table[r + 1][left];
        }
      } else {
        for (int r = 0; r < kRounds; r += 2) {
          left ^= mix64(right + keys[r]) & mask;
          right ^= mix64(left + keys[r + 1]) & mask;
        }
      }
      x = (left << half) | right;
    } while (x >= n);
    return x;
  }
};

// A 1-D contiguous array of exactly T, possibly unaligned.
template <typename T>
struct View {
  const char* data;
  int64_t size;

  View(const py::array& a, const char* name) {
    if (!py::isinstance<py::array_t<T>>(a) || a.ndim() != 1 || (a.size() > 1 && a.strides(0) != sizeof(T)))
      throw py::value_error(std::string(name) + ": expected a contiguous 1-D array of " +
                            std::string(py::str(py::dtype::of<T>())) + ", got " + std::string(py::str(a.dtype())) +
                            " with " + std::to_string(a.ndim()) + " dims");
    data = static_cast<const char*>(a.data());
    size = a.size();
  }

  T operator[](int64_t i) const {
    T value;
    std::memcpy(&value, data + i * int64_t(sizeof(T)), sizeof(T));
    return value;
  }
};

py::array_t<int64_t> permute(uint64_t n, uint64_t key, const py::array& indices) {
  if (n == 0 || n > uint64_t(kMax)) throw py::value_error("permute: n must be in [1, 2^63)");
  const View<int64_t> in(indices, "indices");
  py::array_t<int64_t> result(in.size);
  int64_t* out = result.mutable_data();
  py::gil_scoped_release release;
  const Permutation p(n, key);
  for (int64_t i = 0; i < in.size; ++i) {
    const int64_t x = in[i];
    if (x < 0 || uint64_t(x) >= n)
      throw py::index_error("permute: index " + std::to_string(x) + " is not in [0, " + std::to_string(n) + ")");
    out[i] = int64_t(p(uint64_t(x)));
  }
  return result;
}

// (order int64 [B], prefix int64 [B + 1]): the blocks of an epoch in their order, and the tokens before each of them.
py::tuple block_prefix(const py::array& block_tokens, uint64_t key) {
  const View<int64_t> tokens(block_tokens, "block_tokens");
  py::array_t<int64_t> order(tokens.size), prefix(tokens.size + 1);
  int64_t *o = order.mutable_data(), *p = prefix.mutable_data();
  {
    py::gil_scoped_release release;
    p[0] = 0;
    if (tokens.size > 0) {
      const Permutation permutation(uint64_t(tokens.size), key);
      for (int64_t b = 0; b < tokens.size; ++b) {
        o[b] = int64_t(permutation(uint64_t(b)));
        const int64_t count = tokens[o[b]];
        if (count < 0 || count > kMax - p[b])
          throw py::value_error("block_prefix: block " + std::to_string(o[b]) + " has " + std::to_string(count) +
                                " tokens: negative, or the sum passes 2^63");
        p[b + 1] = p[b] + count;
      }
    }
  }
  return py::make_tuple(order, prefix);
}

// (sequence, expected): the first sequence with a negative length, expected -1, or whose pointer is not the sum of the
// bytes before it, which is `expected`; or (-1, bytes of all). Stops soon after the sum passes `most` bytes.
py::tuple check_sequences(const py::array& length_array, const py::array& pointer_array, int64_t itemsize,
                          int64_t most) {
  const View<int32_t> lengths(length_array, "lengths");
  const View<int64_t> pointers(pointer_array, "pointers");
  if (lengths.size != pointers.size || itemsize < 1 || itemsize > 8 || most < 0)
    throw py::value_error("check_sequences: lengths and pointers differ in number, or a size makes no sense");
  int64_t end = 0, wrong = -1, expected = 0;
  {
    py::gil_scoped_release release;
    for (int64_t i = 0; i < lengths.size && end <= most; ++i) {
      const int64_t length = lengths[i];
      if (length < 0 || pointers[i] != end) {
        wrong = i;
        expected = length < 0 ? -1 : end;
        break;
      }
      if (length > (kMax - end) / itemsize) {  // no file is as long: as good as past `most`
        end = kMax;
        break;
      }
      end += length * itemsize;
    }
  }
  return py::make_tuple(wrong, wrong < 0 ? end : expected);
}

// The first boundary that is less than the one before it, or -1.
int64_t check_rising(const py::array& boundaries) {
  const View<int64_t> view(boundaries, "boundaries");
  py::gil_scoped_release release;
  for (int64_t i = 1; i < view.size; ++i)
    if (view[i] < view[i - 1]) return i;
  return -1;
}

struct Epoch {
  View<int32_t> lengths;   // [N] tokens
  View<int64_t> pointers;  // [N] bytes
  View<int64_t> order;     // [B]
  View<int64_t> prefix;    // [B + 1]
  uint64_t key;
  int64_t block_documents;
};

struct Bad {
  int64_t document = -1, offset = -1, value = 0;
};

int64_t block_of(const View<int64_t>& prefix, int64_t position) {  // the last block that starts at or before position
  int64_t low = 0, high = prefix.size;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (prefix[middle] <= position) low = middle + 1; else high = middle;
  }
  return low - 1;
}

// Copies stream[position : position + count] to out; false when a token is not in [0, limit).
template <typename T>
bool copy_sample(const View<T>& tokens, const Epoch& e, int64_t position, int64_t count, int64_t limit, int64_t* out,
                 Bad* bad) {
  const int64_t num_blocks = e.order.size;
  int64_t at = block_of(e.prefix, position);
  if (position < 0 || at < 0 || at >= num_blocks || e.prefix[at] < 0)
    throw py::index_error("gather: position " + std::to_string(position) + " is outside the stream");
  int64_t skip = position - e.prefix[at], filled = 0;
  for (; filled < count; ++at) {
    if (at >= num_blocks) throw py::index_error("gather: position " + std::to_string(position) + " runs off the end");
    const int64_t block = e.order[at];
    if (block < 0 || block >= num_blocks) throw py::index_error("gather: block " + std::to_string(block));
    const int64_t first = block * e.block_documents;
    const int64_t documents = std::min(e.block_documents, e.lengths.size - first);
    const Permutation permutation(uint64_t(documents), derive(e.key, uint64_t(block)), true);
    for (int64_t i = 0; i < documents && filled < count; ++i) {
      const int64_t document = first + int64_t(permutation(uint64_t(i)));
      const int64_t length = e.lengths[document];
      if (skip >= length && length >= 0) {
        skip -= length;
        continue;
      }
      const int64_t pointer = e.pointers[document];
      if (length < 0 || pointer < 0 || pointer % int64_t(sizeof(T)) != 0 ||
          pointer / int64_t(sizeof(T)) > tokens.size - length)
        throw py::index_error("gather: document " + std::to_string(document) + " lies outside the tokens");
      const int64_t start = pointer / int64_t(sizeof(T)) + skip, take = std::min(length - skip, count - filled);
      bool fine = true;
      for (int64_t k = 0; k < take; ++k) {  // no early exit: it keeps the loop vectorised
        const int64_t value = int64_t(tokens[start + k]);
        out[filled + k] = value;
        fine &= uint64_t(value) < uint64_t(limit);  // a negative id is a huge unsigned one
      }
      if (!fine) {
        int64_t k = 0;
        while (uint64_t(out[filled + k]) < uint64_t(limit)) ++k;
        *bad = Bad{document, skip + k, out[filled + k]};
        return false;
      }
      filled += take;
      skip = 0;
    }
  }
  return true;
}

template <typename T>
Bad gather_rows(const View<T>& tokens, const Epoch& e, const View<int64_t>& positions, int64_t count, int64_t limit,
                int64_t* out) {
  Bad bad;
  for (int64_t row = 0; row < positions.size; ++row)
    if (!copy_sample(tokens, e, positions[row], count, limit, out + row * count, &bad)) break;
  return bad;
}

// (samples int64 [n, count], (document, offset, value) of the first token outside [0, limit), or (-1, -1, 0))
py::tuple gather(const py::array& tokens, const py::array& lengths, const py::array& pointers, const py::array& order,
                 const py::array& prefix, uint64_t key, int64_t block_documents, const py::array& positions,
                 int64_t count, int64_t limit) {
  const Epoch e{View<int32_t>(lengths, "lengths"), View<int64_t>(pointers, "pointers"),
                View<int64_t>(order, "order"), View<int64_t>(prefix, "prefix"), key, block_documents};
  const View<int64_t> at(positions, "positions");
  const int64_t n = e.lengths.size;
  if (count < 1 || limit < 1) throw py::value_error("gather: count and limit must be at least 1");
  if (block_documents < 1 || e.pointers.size != n || e.prefix.size != e.order.size + 1 ||
      e.order.size != n / block_documents + (n % block_documents != 0))
    throw py::value_error("gather: lengths, pointers, order, prefix and block_documents do not fit each other");
  py::array_t<int64_t> result({at.size, count});
  int64_t* out = result.mutable_data();
  Bad bad;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const View<T> view(tokens, "tokens");
    py::gil_scoped_release release;
    bad = gather_rows<T>(view, e, at, count, limit, out);
  };
  if (py::isinstance<py::array_t<uint16_t>>(tokens)) run(uint16_t{});
  else if (py::isinstance<py::array_t<int32_t>>(tokens)) run(int32_t{});
  else if (py::isinstance<py::array_t<uint8_t>>(tokens)) run(uint8_t{});
  else if (py::isinstance<py::array_t<int8_t>>(tokens)) run(int8_t{});
  else if (py::isinstance<py::array_t<int16_t>>(tokens)) run(int16_t{});
  else if (py::isinstance<py::array_t<int64_t>>(tokens)) run(int64_t{});
  else throw py::value_error("tokens: expected u8, i8, u16, i16, i32 or i64, got " +
                             std::string(py::str(tokens.dtype())));
  return py::make_tuple(result, py::make_tuple(bad.document, bad.offset, bad.value));
}

// ---- blends: engine/data/blend.py ----

constexpr int64_t kMaxTotal = int64_t(1) << 40;   // of weights; with kMaxBlock all products below stay under 2^63
constexpr int64_t kMaxBlock = int64_t(1) << 22;   // slots
constexpr int64_t kMaxSources = int64_t(1) << 20;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }  // a >= 0, b > 0

using Due = std::pair<int64_t, int64_t>;  // (deadline, source)
using Heap = std::priority_queue<Due, std::vector<Due>, std::greater<Due>>;

struct Border {                  // of a block, at global sample n
  std::vector<int64_t> counts;   // [K] samples of each source before n
  std::vector<int64_t> part;     // [K] n * weight mod total: how far the job under way is, times total
  std::vector<char> ahead;       // [K] is the job under way already done
};

Border border_at(const std::vector<int64_t>& weights, int64_t total, int64_t n) {
  const int64_t k = int64_t(weights.size());
  Border at{std::vector<int64_t>(k), std::vector<int64_t>(k), std::vector<char>(k)};
  std::vector<std::pair<int64_t, int64_t>> under_way;  // (-slots since its release, source)
  for (int64_t s = 0; s < k; ++s) {
    const auto product = static_cast<unsigned __int128>(n) * static_cast<unsigned __int128>(weights[s]);
    at.counts[s] = int64_t(product / uint64_t(total));
    at.part[s] = int64_t(product % uint64_t(total));
    if (at.part[s] > 0) under_way.emplace_back(-ceil_div(at.part[s], weights[s]), s);
  }
  std::sort(under_way.begin(), under_way.end());
  Heap candidates;
  int64_t sum = 0, chosen = 0;
  for (const auto& [release, s] : under_way) {
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
  if (view.size < 1 || view.size > kMaxSources || length < 1 || length > kMaxBlock || start < 0 ||
      start > (kMax >> 1) - length)
    throw py::value_error("blend_block: expected 1 to 2^20 weights, 1 <= length <= 2^22, 0 <= start < 2^62");
  std::vector<int64_t> weights(view.size);
  int64_t total = 0;
  for (int64_t s = 0; s < view.size; ++s) {
    weights[s] = view[s];
    if (weights[s] < 1 || weights[s] > kMaxTotal - total)
      throw py::value_error("blend_block: weights have to be at least 1 and sum to at most 2^40");
    total += weights[s];
  }
  py::array_t<int64_t> counts(view.size);
  py::array_t<int32_t> sources(length), ordinals(length);
  int64_t* count_out = counts.mutable_data();
  int32_t *source_out = sources.mutable_data(), *ordinal_out = ordinals.mutable_data();
  {
    py::gil_scoped_release release_gil;
    const Border first = border_at(weights, total, start), last = border_at(weights, total, start + length);
    const int64_t k = view.size;
    std::vector<int64_t> head(length, -1), next(k, -1), made(k, 0);  // lists of the sources whose job begins at a slot
    const auto file = [&](int64_t s, int64_t not_before) {           // the next job of source s, unless it has none
      if (first.counts[s] + made[s] >= last.counts[s]) return;
      const int64_t job = first.ahead[s] + made[s], reached = job * total - first.part[s];
      const int64_t slot = std::max(not_before, reached > 0 ? reached / weights[s] : 0);
      if (slot >= length) throw py::value_error("blend_block: a share is too small for this block length");
      next[s] = head[slot];
      head[slot] = s;
    };
    for (int64_t s = 0; s < k; ++s) {
      count_out[s] = first.counts[s];
      file(s, 0);
    }
    Heap waiting;
    for (int64_t i = 0; i < length; ++i) {
      for (int64_t s = head[i]; s >= 0; s = next[s]) {
        const int64_t end = (first.ahead[s] + made[s] + 1) * total - first.part[s];
        waiting.emplace(std::min(ceil_div(end, weights[s]), length), s);
      }
      if (waiting.empty() || waiting.top().first <= i)
        throw py::value_error("blend_block: a share is too small for this block length");
      const int64_t s = waiting.top().second;
      waiting.pop();
      source_out[i] = int32_t(s);
      ordinal_out[i] = int32_t(made[s]++);
      file(s, i + 1);
    }
  }
  return py::make_tuple(counts, sources, ordinals);
}

template <typename Out>
std::optional<int32_t> pack_into(const View<int32_t>& tokens, const std::vector<int32_t>& lengths, int32_t eod, Out* out,
                                 int64_t* counts, int64_t vocab_size) {
  int64_t i = 0;
  for (const int32_t length : lengths) {
    for (const int64_t end = i + length; i < end; ++i) {
      const int32_t token = tokens[i];
      if (token < 0 || token >= vocab_size) return token;
      ++counts[token];
      *out++ = Out(token);
    }
    if (eod >= 0 && length > 0) {
      ++counts[eod];
      *out++ = Out(eod);
    }
  }
  return std::nullopt;
}

// The documents of `tokens` with `eod` (-1: none) behind those that are not empty, to `out`; their histogram is added to
// `counts`. Returns an id that is not below its size, after which nothing is written.
std::optional<int32_t> pack(const py::array& tokens, const py::array& lengths, int32_t eod, py::array out,
                            py::array_t<int64_t> counts) {
  const View<int32_t> in(tokens, "tokens"), given(lengths, "lengths");
  const View<int64_t> histogram(counts, "counts");
  const bool narrow = py::isinstance<py::array_t<uint16_t>>(out);
  const int64_t room = narrow ? View<uint16_t>(out, "out").size : View<int32_t>(out, "out").size;
  std::vector<int32_t> sizes(given.size);  // a copy: the sizes checked are the sizes used
  int64_t needed = 0, written = 0;
  for (int64_t d = 0; d < given.size; ++d) {
    sizes[d] = given[d];
    if (sizes[d] < 0) throw py::value_error("pack: a length is negative");
    needed += sizes[d];
    written += int64_t(sizes[d]) + (eod >= 0 && sizes[d] > 0);
  }
  if (needed != in.size || written != room)
    throw py::index_error("pack: the lengths do not sum to the sizes of tokens and out");
  const int64_t vocab_size = histogram.size;
  if (narrow && vocab_size > 65536) throw py::value_error("pack: uint16 does not hold the ids of this vocabulary");
  if (eod >= vocab_size) return eod;
  int64_t* count = counts.mutable_data();  // raises ValueError if it is read-only
  void* target = out.mutable_data();
  py::gil_scoped_release release_gil;
  if (narrow) return pack_into(in, sizes, eod, static_cast<uint16_t*>(target), count, vocab_size);
  return pack_into(in, sizes, eod, static_cast<int32_t*>(target), count, vocab_size);
}

}  // namespace

PYBIND11_MODULE(_index, m) {
  m.doc() = "Sample order, batch gather and blends; see engine/data/order.py and blend.py for the definitions.";
  m.def("permute", &permute, py::arg("n"), py::arg("key"), py::arg("indices"));
  m.def("block_prefix", &block_prefix, py::arg("block_tokens"), py::arg("key"));
  m.def("gather", &gather, py::arg("tokens"), py::arg("lengths"), py::arg("pointers"), py::arg("order"),
        py::arg("prefix"), py::arg("key"), py::arg("block_documents"), py::arg("positions"), py::arg("count"),
        py::arg("limit"));
  m.def("check_sequences", &check_sequences, py::arg("lengths"), py::arg("pointers"), py::arg("itemsize"),
        py::arg("most"));
  m.def("check_rising", &check_rising, py::arg("boundaries"));
  m.def("pack", &pack, py::arg("tokens"), py::arg("lengths"), py::arg("eod"), py::arg("out"),
        py::arg("counts").noconvert());
  m.def("blend_block", &blend_block, py::arg("weights"), py::arg("start"), py::arg("length"));
}
