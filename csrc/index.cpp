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
#include <thread>
#include <utility>
#include <vector>

#include "guard.h"

#if defined(__x86_64__) && defined(__GNUC__)  // taken at run time, where the processor has it
#define TRIDENT_AVX2
#include <immintrin.h>
#endif

namespace py = pybind11;

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
constexpr int kRounds = 8;  // even: two are done at a time
constexpr int kTableHalf = 5;  // 2 * 5 bits hold a block of 1,024 documents
constexpr int64_t kProven = 4096;  // sequences proven at a time: no sum of so many lengths can wrap
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

  Permutation(uint64_t count, uint64_t key) : n(count) {
    while (half < 32 && (1ull << (2 * half)) < n) ++half;
    mask = (1ull << half) - 1;
    for (int r = 0; r < kRounds; ++r) keys[r] = mix64(key + uint64_t(r + 1) * kGolden);
  }

  uint64_t operator()(uint64_t x) const {  // x < n, which cycle walking keeps true; terminates as it is a bijection
    if (n == 1) return 0;
    do {
      uint64_t left = x >> half, right = x & mask;
      for (int r = 0; r < kRounds; r += 2) {
        left ^= mix64(right + keys[r]) & mask;
        right ^= mix64(left + keys[r + 1]) & mask;
      }
      x = (left << half) | right;
    } while (x >= n);
    return x;
  }
};

// The network of a Permutation of a block of documents, for its whole domain at once: halves of 5 bits fit in bytes and
// what a round adds in a table of 32, so that 256 mixes do instead of 8 for each document, and 32 documents go together.
struct BlockOrder {
  static constexpr int kSide = 1 << kTableHalf, kDomain = kSide * kSide;
  const Permutation permutation;
  const bool small;
  uint8_t left[kDomain], right[kDomain];

  BlockOrder(uint64_t count, uint64_t key) : permutation(count, key), small(permutation.half <= kTableHalf) {
    if (!small) return;
    uint8_t table[kRounds][kSide] = {};
    for (int r = 0; r < kRounds; ++r)
      for (uint64_t x = 0; x <= permutation.mask; ++x)
        table[r][x] = uint8_t(mix64(x + permutation.keys[r]) & permutation.mask);
    for (int x = 0; x < kDomain; ++x) {
      left[x] = uint8_t(x >> permutation.half) & (kSide - 1);
      right[x] = uint8_t(uint64_t(x) & permutation.mask);
    }
#ifdef TRIDENT_AVX2
    static const bool avx2 = __builtin_cpu_supports("avx2");
    if (avx2) {
      rounds_avx2(table);
      return;
    }
#endif
    for (int r = 0; r < kRounds; r += 2)
      for (int x = 0; x < kDomain; ++x) {
        left[x] ^= table[r][right[x]];
        right[x] ^= table[r + 1][left[x]];
      }
  }

#ifdef TRIDENT_AVX2
  __attribute__((target("avx2"))) void rounds_avx2(const uint8_t (&table)[kRounds][kSide]) {
    for (int x = 0; x < kDomain; x += 32) {
      auto *left_at = reinterpret_cast<__m256i*>(left + x), *right_at = reinterpret_cast<__m256i*>(right + x);
      __m256i sides[2] = {_mm256_loadu_si256(left_at), _mm256_loadu_si256(right_at)};
      for (int r = 0; r < kRounds; ++r) {
        const __m256i at = sides[1 - r % 2];  // shuffles look at 4 bits of it, the blend at the fifth
        const auto* rows = reinterpret_cast<const __m128i*>(table[r]);
        const __m256i low = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(rows)), at);
        const __m256i high = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(rows + 1)), at);
        sides[r % 2] = _mm256_xor_si256(sides[r % 2], _mm256_blendv_epi8(low, high, _mm256_slli_epi16(at, 3)));
      }
      _mm256_storeu_si256(left_at, sides[0]);
      _mm256_storeu_si256(right_at, sides[1]);
    }
  }
#endif

  uint64_t operator()(uint64_t x) const {  // x < n
    if (!small) return permutation(x);
    if (permutation.n == 1) return 0;
    do x = uint64_t(left[x]) << permutation.half | right[x];
    while (x >= permutation.n);
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

// Runs part(t) for t in [0, threads) side by side, part(0) in this thread. part must not throw.
template <typename Part>
void in_parallel(int64_t threads, const Part& part) {
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(part, t);
  part(0);
  for (auto& other : others) other.join();
}

// The first block of kProven sequences in [low, high) that is not proven good by pointers alone, or high: lengths that
// are not negative, and each pointer the one before it and the bytes between. No branches, so that it is vectorised.
int64_t first_doubt(const View<int32_t>& lengths, const View<int64_t>& pointers, int64_t itemsize, int64_t most,
                    int64_t low, int64_t high) {
  for (; low < high; low += kProven) {
    const int64_t last = std::min(low + kProven, high) - 1;
    uint64_t differ = 0, negative = 0;
    for (int64_t i = low; i < last; ++i) {
      const uint64_t length = uint32_t(lengths[i]);
      negative |= length;
      differ |= (uint64_t(pointers[i]) + length * uint64_t(itemsize)) ^ uint64_t(pointers[i + 1]);
    }
    const int64_t start = pointers[low], length = lengths[last], end = pointers[last];
    if (differ || negative >> 31 || length < 0 || start < 0 || end < start || end > most - length * itemsize) return low;
    if (last + 1 < high && pointers[last + 1] != end + length * itemsize) return low;
  }
  return high;
}

// (sequence, expected): the first sequence with a negative length, expected -1, or whose pointer is not the sum of the
// bytes before it, which is `expected`; or (-1, bytes of all). Stops soon after the sum passes `most` bytes.
py::tuple check_sequences(const py::array& length_array, const py::array& pointer_array, int64_t itemsize, int64_t most,
                          int64_t threads) {
  const View<int32_t> lengths(length_array, "lengths");
  const View<int64_t> pointers(pointer_array, "pointers");
  if (lengths.size != pointers.size || itemsize < 1 || itemsize > 8 || most < 0 || threads < 1)
    throw py::value_error("check_sequences: lengths and pointers differ in number, or a size makes no sense");
  int64_t end = 0, wrong = -1, expected = 0;
  {
    py::gil_scoped_release release;
    const int64_t n = lengths.size, share = n / threads + 1;
    std::vector<int64_t> doubts(threads);
    const auto low_of = [&](int64_t t) { return std::min(n, t * share); };
    in_parallel(threads, [&](int64_t t) {
      doubts[t] = first_doubt(lengths, pointers, itemsize, most, low_of(t), low_of(t + 1));
    });
    int64_t i = 0;  // all before it is proven, to `end`
    for (int64_t t = 0; t < threads && i == low_of(t) && i < n && pointers[i] == end; ++t) {
      i = doubts[t];
      end = i == 0 ? 0 : pointers[i - 1] + lengths[i - 1] * itemsize;
    }
    for (; i < n && end <= most; ++i) {  // the rest one by one
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
int64_t check_rising(const py::array& boundaries, int64_t threads) {
  const View<int64_t> view(boundaries, "boundaries");
  if (threads < 1) throw py::value_error("check_rising: threads must be at least 1");
  py::gil_scoped_release release;
  const int64_t share = view.size / threads + 1;
  std::vector<uint64_t> doubts(threads);
  in_parallel(threads, [&](int64_t t) {
    uint64_t doubt = 0;  // the sign bit: a fall, or a number below 0, where the difference might wrap
    for (int64_t i = t * share + 1, end = std::min(view.size, (t + 1) * share + 1); i < end; ++i) {
      const uint64_t before = uint64_t(view[i - 1]), here = uint64_t(view[i]);
      doubt |= before | here | (here - before);
    }
    doubts[t] = doubt;
  });
  uint64_t doubt = 0;
  for (const uint64_t each : doubts) doubt |= each;
  if (doubt >> 63)
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

struct Piece {  // of a sample: `take` tokens of a document from its token `offset` on, which is tokens[start]
  int64_t document, offset, start, take;
};

constexpr int64_t kLine = 64;  // bytes of a cache line

inline void prefetch(const char* from, int64_t bytes) {
#ifdef __GNUC__
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at);
#endif
}

// Where stream[position] begins, and its lengths on their way into the cache.
int64_t find_block(const Epoch& e, int64_t position) {
  const int64_t at = block_of(e.prefix, position);
  if (position < 0 || at < 0 || at >= e.order.size || e.prefix[at] < 0)
    throw py::index_error("gather: position " + std::to_string(position) + " is outside the stream");
  const int64_t first = e.order[at] * e.block_documents;
  if (first >= 0 && first < e.lengths.size)
    prefetch(e.lengths.data + first * 4, std::min(e.block_documents, e.lengths.size - first) * 4);
  return at;
}

// Fills `pieces` with those of stream[position : position + count], which begins in the at-th block of the order.
template <typename T>
void find_pieces(const View<T>& tokens, const Epoch& e, int64_t at, int64_t position, int64_t count,
                 std::vector<Piece>& pieces) {
  const int64_t num_blocks = e.order.size;
  int64_t skip = position - e.prefix[at], filled = 0;
  for (pieces.clear(); filled < count; ++at) {
    if (at >= num_blocks) throw py::index_error("gather: position " + std::to_string(position) + " runs off the end");
    const int64_t block = e.order[at];
    if (block < 0 || block >= num_blocks) throw py::index_error("gather: block " + std::to_string(block));
    const int64_t first = block * e.block_documents;
    const int64_t documents = std::min(e.block_documents, e.lengths.size - first);
    const BlockOrder inside(uint64_t(documents), derive(e.key, uint64_t(block)));
    for (int64_t i = 0; i < documents && filled < count; ++i) {
      const int64_t document = first + int64_t(inside(uint64_t(i)));
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
      prefetch(tokens.data + start * int64_t(sizeof(T)), take * int64_t(sizeof(T)));
      pieces.push_back(Piece{document, skip, start, take});
      filled += take;
      skip = 0;
    }
  }
}

// Copies the pieces to out, one after the other; false when a token is not in [0, limit).
template <typename T>
bool copy_pieces(const View<T>& tokens, const std::vector<Piece>& pieces, int64_t limit, int64_t* out, Bad* bad) {
  for (const Piece piece : pieces) {  // a copy: through a reference, out might overlap it
    uint64_t fine = ~uint64_t(0);  // the sign bit: every value >= 0 and value - limit < 0
    for (int64_t k = 0; k < piece.take; ++k) {  // no early exit and no comparison: it keeps the loop vectorised
      const int64_t value = int64_t(tokens[piece.start + k]);
      out[k] = value;
      fine &= (uint64_t(value) - uint64_t(limit)) & ~uint64_t(value);
    }
    if (!(fine >> 63)) {
      int64_t k = 0;
      while (uint64_t(out[k]) < uint64_t(limit)) ++k;
      *bad = Bad{piece.document, piece.offset + k, out[k]};
      return false;
    }
    out += piece.take;
  }
  return true;
}

// Nearly all of a random sample's time is waiting for memory. So while a row is copied, the tokens of the next one and
// the lengths of the one after it are on their way.
template <typename T>
Bad gather_rows(const View<T>& tokens, const Epoch& e, const View<int64_t>& positions, int64_t count, int64_t limit,
                int64_t* out) {
  Bad bad;
  std::vector<Piece> here, next;
  int64_t block = 0;
  for (int64_t row = 0; row < positions.size + 2; ++row) {
    const int64_t found = row < positions.size ? find_block(e, positions[row]) : 0;
    if (row > 0 && row <= positions.size) find_pieces(tokens, e, block, positions[row - 1], count, next);
    if (row > 1 && !copy_pieces(tokens, here, limit, out + (row - 2) * count, &bad)) break;
    std::swap(here, next);
    block = found;
  }
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
  m.attr("interface") = 3;  // NATIVE_INTERFACE of engine/data/indexed.py
  m.def("guard", [](const py::buffer& file) {  // token for lost and release
    const py::buffer_info info = file.request();
    return guard::add(info.ptr, info.size * info.itemsize);
  });
  m.def("lost", &guard::lost);
  m.def("release", &guard::release);
  m.def("permute", &permute, py::arg("n"), py::arg("key"), py::arg("indices"));
  m.def("block_prefix", &block_prefix, py::arg("block_tokens"), py::arg("key"));
  m.def("gather", &gather, py::arg("tokens"), py::arg("lengths"), py::arg("pointers"), py::arg("order"),
        py::arg("prefix"), py::arg("key"), py::arg("block_documents"), py::arg("positions"), py::arg("count"),
        py::arg("limit"));
  m.def("check_sequences", &check_sequences, py::arg("lengths"), py::arg("pointers"), py::arg("itemsize"),
        py::arg("most"), py::arg("threads") = 1);
  m.def("check_rising", &check_rising, py::arg("boundaries"), py::arg("threads") = 1);
  m.def("pack", &pack, py::arg("tokens"), py::arg("lengths"), py::arg("eod"), py::arg("out"),
        py::arg("counts").noconvert());
  m.def("blend_block", &blend_block, py::arg("weights"), py::arg("start"), py::arg("length"));
}
