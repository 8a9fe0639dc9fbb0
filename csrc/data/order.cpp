// Random access to the stream of an epoch; engine/data/samples/stream.py has the definition and the reference.
//
// Reading a random sample is almost entirely memory latency. So the data of a row is prefetched while earlier rows are
// processed: the lengths of its round two rows ahead, its tokens one row ahead.

#include <memory>
#include <mutex>

#include "data/index.h"

#if defined(__x86_64__) && defined(__GNUC__)  // used at run time if the processor supports it
#define TRIDENT_AVX2
#include <immintrin.h>
#endif

namespace {

constexpr int64_t QUARTERS = 4;
constexpr int64_t ROUND_BLOCKS = 256;  // at most; halves of 4 bits
constexpr int64_t LINE = 64;           // bytes of a cache line

inline void prefetch(const char* from, int64_t bytes) {
#ifdef __GNUC__
    for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(from + at);
#endif
}

// Permutation(count, key) for count <= 256, computed for all places at once. The halves have at most 4 bits, so each
// fits in a byte and a round function in a table of 16: 128 mixes in total instead of 8 per place, 32 places at a time.
struct RoundOrder {
    static constexpr int SIDE = 16, DOMAIN = SIDE * SIDE;
    const Permutation permutation;
    uint8_t left[DOMAIN], right[DOMAIN];

    RoundOrder(uint64_t count, uint64_t key) : permutation(count, key) {
        uint8_t table[ROUNDS][SIDE] = {};
        for (int r = 0; r < ROUNDS; ++r)
            for (uint64_t x = 0; x <= permutation.mask; ++x)
                table[r][x] = uint8_t(mix64(x + permutation.keys[r]) & permutation.mask);
        for (int x = 0; x < DOMAIN; ++x) {
            left[x] = uint8_t(x >> permutation.half) & (SIDE - 1);
            right[x] = uint8_t(uint64_t(x) & permutation.mask);
        }
#ifdef TRIDENT_AVX2
        static const bool avx2 = __builtin_cpu_supports("avx2");
        if (avx2) {
            rounds_avx2(table);
            return;
        }
#endif
        for (int r = 0; r < ROUNDS; r += 2)
            for (int x = 0; x < DOMAIN; ++x) {
                left[x] ^= table[r][right[x]];
                right[x] ^= table[r + 1][left[x]];
            }
    }

#ifdef TRIDENT_AVX2
    __attribute__((target("avx2"))) void rounds_avx2(const uint8_t (&table)[ROUNDS][SIDE]) {
        __m256i rows[ROUNDS];
        for (int r = 0; r < ROUNDS; ++r)
            rows[r] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table[r])));
        for (int x = 0; x < DOMAIN; x += 32) {
            auto *left_at = reinterpret_cast<__m256i*>(left + x), *right_at = reinterpret_cast<__m256i*>(right + x);
            __m256i l = _mm256_loadu_si256(left_at), r = _mm256_loadu_si256(right_at);
            for (int round = 0; round < ROUNDS; round += 2) {
                l = _mm256_xor_si256(l, _mm256_shuffle_epi8(rows[round], r));
                r = _mm256_xor_si256(r, _mm256_shuffle_epi8(rows[round + 1], l));
            }
            _mm256_storeu_si256(left_at, l);
            _mm256_storeu_si256(right_at, r);
        }
    }
#endif

    int64_t operator()(int64_t x) const {  // x < n
        if (permutation.n == 1) return 0;
        do x = int64_t(left[x]) << permutation.half | right[x];
        while (uint64_t(x) >= permutation.n);
        return x;
    }
};

struct Block {  // documents [first, first + size) of the corpus; its reading starts at first + offset
    int64_t first;
    int32_t offset, size;
};

struct Group {
    std::vector<Block> blocks;    // in order
    std::vector<int64_t> before;  // [rounds + 1] tokens of the stream before each round
};

struct Round {  // its documents in order
    int64_t group = 0, number = 0, count = 0;
    int64_t documents[ROUND_BLOCKS];
};

struct Piece {  // of a sample: `take` tokens of a document from its token `offset`, which is tokens[start]
    int64_t document, offset, start, take;
};

struct Bad {
    int64_t document = -1, offset = -1, value = 0;
};

// Copies the concatenated pieces to out; returns false if a token is not in [0, limit).
template <typename T>
bool copy_pieces(const View<T>& tokens, const std::vector<Piece>& pieces, int64_t limit, int64_t* out, Bad* bad) {
    for (const Piece piece : pieces) {              // a copy: through a reference, out might overlap it
        uint64_t fine = ~uint64_t(0);               // sign bit: every value >= 0 and value - limit < 0
        for (int64_t k = 0; k < piece.take; ++k) {  // no early exit and no comparison, so that the loop is vectorised
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

class Stream {
  public:
    Stream(py::array tokens, py::array lengths, py::array pointers, int64_t blocks, int64_t group_blocks,
           uint64_t block_key, uint64_t document_key, uint64_t round_key)
        : token_array_(std::move(tokens)), length_array_(std::move(lengths)), pointer_array_(std::move(pointers)),
          lengths_(length_array_, "lengths"), pointers_(pointer_array_, "pointers"), documents_(lengths_.size),
          blocks_(blocks), group_blocks_(group_blocks), itemsize_(token_array_.itemsize()), total_(token_array_.size()),
          order_(uint64_t(std::max<int64_t>(blocks, 1)), block_key), document_key_(document_key),
          round_key_(round_key) {
        if (pointers_.size != documents_) throw py::value_error("Stream: lengths and pointers differ in number");
        if (blocks < 1 || blocks > documents_ || blocks > MAX / documents_ || documents_ / blocks >= (1 << 30) ||
            group_blocks < 1 || group_blocks > QUARTERS * ROUND_BLOCKS || itemsize_ < 1)
            throw py::value_error("Stream: expected 1 to `documents` blocks, and 1 to 1024 of them in a group");
        py::gil_scoped_release release;
        count_groups();
    }

    // (samples int64 [n, count], (document, offset, value) of the first token outside [0, limit), or (-1, -1, 0))
    py::tuple gather(const py::array& positions, int64_t count, int64_t limit) {
        const View<int64_t> at(positions, "positions");
        if (count < 1 || limit < 1) throw py::value_error("gather: count and limit must be at least 1");
        py::array_t<int64_t> result({at.size, count});
        int64_t* out = result.mutable_data();
        Bad bad;
        const auto run = [&](auto zero) {
            using T = decltype(zero);
            const View<T> view(token_array_, "tokens");
            py::gil_scoped_release release;
            bad = gather_rows<T>(view, at, count, limit, out);
        };
        if (py::isinstance<py::array_t<uint16_t>>(token_array_))
            run(uint16_t{});
        else if (py::isinstance<py::array_t<int32_t>>(token_array_))
            run(int32_t{});
        else if (py::isinstance<py::array_t<uint8_t>>(token_array_))
            run(uint8_t{});
        else if (py::isinstance<py::array_t<int8_t>>(token_array_))
            run(int8_t{});
        else if (py::isinstance<py::array_t<int16_t>>(token_array_))
            run(int16_t{});
        else if (py::isinstance<py::array_t<int64_t>>(token_array_))
            run(int64_t{});
        else
            throw py::value_error("tokens: expected u8, i8, u16, i16, i32 or i64, got " +
                                  std::string(py::str(token_array_.dtype())));
        return py::make_tuple(result, py::make_tuple(bad.document, bad.offset, bad.value));
    }

    // [(document, offset in it, tokens taken)] of stream[position : position + count]
    std::vector<std::tuple<int64_t, int64_t, int64_t>> parts(int64_t position, int64_t count) {
        std::vector<Piece> pieces;
        Round round;
        find_round(position, &round);
        find_pieces(&round, position, count, &pieces);
        std::vector<std::tuple<int64_t, int64_t, int64_t>> found;
        for (const Piece& piece : pieces) found.emplace_back(piece.document, piece.offset, piece.take);
        return found;
    }

  private:
    int64_t first_of(int64_t block) const { return block * documents_ / blocks_; }

    int64_t tokens_before(int64_t document) const {
        return document < documents_ ? pointers_[document] / itemsize_ : total_;
    }

    // Sets prefix_ [groups + 1]: tokens before each group. Reads one pointer per block, in file order.
    void count_groups() {
        const int64_t groups = (blocks_ + group_blocks_ - 1) / group_blocks_;
        prefix_.assign(groups + 1, 0);
        groups_.resize(groups);
        // first: block * documents / blocks, of which rest is the remainder
        int64_t begin = tokens_before(0), first = 0, rest = 0;
        if (begin != 0) throw py::index_error("Stream: document 0 does not start at token 0");
        const int64_t whole = documents_ / blocks_, more = documents_ % blocks_;
        for (int64_t block = 0; block < blocks_; ++block) {
            first += whole;
            if ((rest += more) >= blocks_) rest -= blocks_, ++first;
            const int64_t end = tokens_before(first);
            if (end < begin || end > total_)
                throw py::index_error("Stream: document " + std::to_string(first) + " is outside the tokens");
            prefix_[1 + order_(uint64_t(block)) / uint64_t(group_blocks_)] += end - begin;
            begin = end;
        }
        for (int64_t g = 0; g < groups; ++g) prefix_[g + 1] += prefix_[g];
    }

    const Group& group(int64_t number) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!groups_[number]) groups_[number] = std::make_unique<Group>(make_group(number));
        return *groups_[number];
    }

    int64_t quarter_begin(int64_t quarter, int64_t count) const { return quarter * count / QUARTERS; }

    Group make_group(int64_t number) const {
        const int64_t place = number * group_blocks_, count = std::min(group_blocks_, blocks_ - place);
        Group result;
        int64_t most = 0;
        for (int64_t j = 0; j < count; ++j) {
            const int64_t block = int64_t(order_.inverse(uint64_t(place + j))), first = first_of(block);
            const int64_t size = first_of(block + 1) - first;
            const auto offset = int32_t(derive(document_key_, uint64_t(block)) % uint64_t(size));
            result.blocks.push_back(Block{first, offset, int32_t(size)});
            most = std::max(most, size);
        }
        result.before.assign(most * QUARTERS + 1, 0);
        std::vector<int64_t> sums(most);
        int32_t negative = 0;
        for (int64_t quarter = 0; quarter < QUARTERS; ++quarter) {
            std::fill(sums.begin(), sums.end(), 0);
            for (int64_t j = quarter_begin(quarter, count); j < quarter_begin(quarter + 1, count); ++j) {
                const Block block = result.blocks[j];
                const int64_t head = block.size - block.offset;
                negative |= add_lengths(block.first + block.offset, head, sums.data());
                negative |= add_lengths(block.first, block.offset, sums.data() + head);
            }
            for (int64_t pass = 0; pass < most; ++pass) result.before[1 + pass * QUARTERS + quarter] = sums[pass];
        }
        result.before[0] = prefix_[number];
        for (size_t t = 1; t < result.before.size(); ++t) result.before[t] += result.before[t - 1];
        if (negative < 0 || result.before.back() != prefix_[number + 1])
            throw py::index_error("Stream: lengths and pointers do not fit each other");
        return result;
    }

    int32_t add_lengths(int64_t first, int64_t count, int64_t* sums) const {
        int32_t seen = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int32_t length = lengths_[first + i];
            sums[i] += length;
            seen |= length;
        }
        return seen;
    }

    void list_round(const Group& group, Round* round) const {
        const int64_t count = int64_t(group.blocks.size()), pass = round->number / QUARTERS;
        const int64_t quarter = round->number % QUARTERS, begin = quarter_begin(quarter, count);
        const int64_t size = quarter_begin(quarter + 1, count) - begin;
        round->count = 0;
        if (size == 0) return;
        const uint64_t key = derive(derive(round_key_, uint64_t(round->group)), uint64_t(round->number));
        const RoundOrder order(uint64_t(size), key);
        for (int64_t i = 0; i < size; ++i) {
            const Block& block = group.blocks[begin + order(i)];
            int64_t at = pass + block.offset;
            if (at >= block.size) at -= block.size;
            round->documents[round->count] = block.first + at;
            round->count += pass < block.size;
        }
    }

    // Finds the round that contains stream[position], and prefetches the lengths needed to locate it in the round.
    void find_round(int64_t position, Round* round) {
        if (position < 0 || position >= total_)
            throw py::index_error("gather: position " + std::to_string(position) + " is outside the stream");
        round->group = std::upper_bound(prefix_.begin(), prefix_.end(), position) - prefix_.begin() - 1;
        const Group& in = group(round->group);
        round->number = std::upper_bound(in.before.begin(), in.before.end(), position) - in.before.begin() - 1;
        list_round(in, round);
        const double begin = double(in.before[round->number]), end = double(in.before[round->number + 1]);
        const double part = (double(position) - begin) / (end - begin) * double(round->count);
        const int64_t middle = std::min(std::max(int64_t(part), int64_t(0)), round->count);
        const bool back = from_end(in, *round, position);
        for (int64_t i = back ? middle : 0, stop = back ? round->count : middle; i < stop; ++i)
            prefetch(lengths_.data + round->documents[i] * 4, 1);
    }

    static bool from_end(const Group& in, const Round& round, int64_t position) {
        return in.before[round.number + 1] - position < position - in.before[round.number];
    }

    // Fills `pieces` with those of stream[position : position + count], which begins in `round`; `round` ends at the last.
    void find_pieces(Round* round, int64_t position, int64_t count, std::vector<Piece>* pieces) {
        const Group* in = &group(round->group);
        int64_t i = 0, at = in->before[round->number];  // stream[at] is the start of the i-th document of the round
        if (from_end(*in, *round, position)) {
            at = in->before[round->number + 1];
            for (i = round->count; i > 0 && at > position;) at -= lengths_[round->documents[--i]];
        } else {
            for (; i < round->count && at + lengths_[round->documents[i]] <= position; ++i)
                at += lengths_[round->documents[i]];
        }
        int64_t skip = position - at, filled = 0;
        for (pieces->clear(); filled < count; i = 0) {
            for (; i < round->count && filled < count; ++i) {
                const Piece piece = piece_of(round->documents[i], skip, count - filled);
                if (piece.take > 0) pieces->push_back(piece);
                filled += piece.take;
                skip = 0;
            }
            if (filled == count) break;
            if (++round->number == int64_t(in->before.size()) - 1) {
                if (++round->group == int64_t(groups_.size()))
                    throw py::index_error("gather: position " + std::to_string(position) + " runs off the end");
                round->number = 0;
                in = &group(round->group);
            }
            list_round(*in, round);
        }
    }

    // At most `most` tokens of a document from its token `skip`, which are prefetched.
    Piece piece_of(int64_t document, int64_t skip, int64_t most) const {
        const int64_t length = lengths_[document], pointer = pointers_[document];
        if (skip < 0 || length < skip || pointer < 0 || pointer % itemsize_ != 0 ||
            pointer / itemsize_ > total_ - length)
            throw py::index_error("gather: document " + std::to_string(document) + " is outside the tokens");
        const Piece piece{document, skip, pointer / itemsize_ + skip, std::min(length - skip, most)};
        prefetch(static_cast<const char*>(token_array_.data()) + piece.start * itemsize_, piece.take * itemsize_);
        return piece;
    }

    template <typename T>
    Bad gather_rows(const View<T>& tokens, const View<int64_t>& positions, int64_t count, int64_t limit, int64_t* out) {
        Bad bad;
        std::vector<Piece> here, next;
        Round rounds[2];
        for (int64_t row = 0; row < positions.size + 2; ++row) {
            if (row < positions.size) find_round(positions[row], &rounds[row % 2]);
            if (row > 0 && row <= positions.size) find_pieces(&rounds[(row - 1) % 2], positions[row - 1], count, &next);
            if (row > 1 && !copy_pieces(tokens, here, limit, out + (row - 2) * count, &bad)) break;
            std::swap(here, next);
        }
        return bad;
    }

    const py::array token_array_, length_array_, pointer_array_;  // own the memory of the views
    const View<int32_t> lengths_;                                 // [documents] tokens
    const View<int64_t> pointers_;                                // [documents] bytes
    const int64_t documents_, blocks_, group_blocks_, itemsize_, total_;
    const Permutation order_;
    const uint64_t document_key_, round_key_;
    std::vector<int64_t> prefix_;                 // [groups + 1]
    std::vector<std::unique_ptr<Group>> groups_;  // created at first use
    std::mutex mutex_;                            // protects groups_: several threads may read
};

}  // namespace

void bind_order(py::module_& m) {
    py::class_<Stream>(m, "Stream")
        .def(py::init<py::array, py::array, py::array, int64_t, int64_t, uint64_t, uint64_t, uint64_t>(),
             py::arg("tokens"), py::arg("lengths"), py::arg("pointers"), py::arg("blocks"), py::arg("group_blocks"),
             py::arg("block_key"), py::arg("document_key"), py::arg("round_key"))
        .def("gather", &Stream::gather, py::arg("positions"), py::arg("count"), py::arg("limit"))
        .def("parts", &Stream::parts, py::arg("position"), py::arg("count"));
}
