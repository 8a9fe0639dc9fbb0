// Memory layout of a group's shared segment, and the writing end of a ring in it.
//
// A segment holds, for each rank, a ring of bytes that only this rank writes and counters that only this rank raises;
// and for each ordered pair of ranks a smaller ring for messages, with its counters. channel.h says how they are used.
//
// Memory order: a counter is stored with `release` after the bytes and the tag that it announces were written, and
// loaded with `acquire` before they are read: a reader that sees the number sees the bytes. `done` is stored with
// `release` after the last read, and loaded with `acquire` before the space is written again: no write overtakes a
// read. Every counter has one writer.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

namespace trident {

using Counter = std::atomic<uint64_t>;
static_assert(Counter::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

constexpr uint64_t LINE = 64, PAGE = 4096;
constexpr uint64_t SLOTS = 64;  // chunks that a ring may hold at a time
constexpr uint64_t MAGIC = 0x746e656469727431;

struct Slot {
    uint64_t at, tag;
};

struct alignas(LINE) Lane {  // one writer's announcements
    alignas(LINE) Counter published;
    Slot slots[SLOTS];
};

struct alignas(LINE) Member {
    Lane lane;
    alignas(LINE) Counter summed;
    alignas(LINE) Counter done;
    alignas(LINE) std::atomic<uint32_t> bell;
    std::atomic<uint32_t> waits_for;  // rank + 1; 0: no rank
};

struct alignas(LINE) Pair {
    Lane lane;
    alignas(LINE) Counter done;
};

struct Head {
    Counter magic;
    uint64_t token, ranks, ring, pair_ring;
};

inline uint64_t rounded(uint64_t x, uint64_t to) { return (x + to - 1) / to * to; }

// Byte offsets of the parts of a segment.
struct Plan {
    uint64_t ranks, ring, pair_ring;
    uint64_t members() const { return PAGE; }
    uint64_t pairs() const { return members() + rounded(ranks * sizeof(Member), PAGE); }
    uint64_t rings() const { return pairs() + rounded(ranks * ranks * sizeof(Pair), PAGE); }
    uint64_t pair_rings() const { return rings() + ranks * ring; }
    uint64_t bytes() const { return pair_rings() + ranks * ranks * pair_ring; }
};

// A mapped segment; the destructor unmaps it.
class Segment {
  public:
    // Creates a segment (fd: an empty file) or maps an existing one. token: random number that identifies it.
    Segment(int fd, uint64_t token, int ranks, uint64_t ring, uint64_t pair_ring, bool make);
    ~Segment();
    Segment(const Segment&) = delete;
    Segment& operator=(const Segment&) = delete;

    const Plan plan;

    Member& member(uint64_t q) const { return reinterpret_cast<Member*>(base_ + plan.members())[q]; }
    Pair& pair(uint64_t from, uint64_t to) const {
        return reinterpret_cast<Pair*>(base_ + plan.pairs())[from * plan.ranks + to];
    }
    char* data(uint64_t q) const { return base_ + plan.rings() + q * plan.ring; }
    char* pair_data(uint64_t from, uint64_t to) const {
        return base_ + plan.pair_rings() + (from * plan.ranks + to) * plan.pair_ring;
    }

  private:
    char* base_ = nullptr;
};

// The writing end of a ring.
class Ring {
  public:
    Ring(Lane& lane, char* base, uint64_t size, std::vector<const Counter*> readers)
        : lane_(lane), base_(base), size_(size), readers_(std::move(readers)) {}

    uint64_t published() const { return next_; }

    uint64_t least_done() const {
        uint64_t least = UINT64_MAX;
        for (const Counter* done : readers_) least = std::min(least, done->load(std::memory_order_acquire));
        return least;
    }

    // Reserves space for `bytes` bytes; null if readers have not freed enough yet.
    char* reserve(uint64_t bytes) {
        const uint64_t done = least_done(), need = rounded(std::max<uint64_t>(bytes, 1), LINE);
        while (!used_.empty() && used_.front().chunk < done) used_.pop_front();
        if (used_.empty()) {
            head_ = 0;  // the same pages again, which are in the cache
        } else {
            const uint64_t tail = used_.front().at;
            if (used_.size() >= SLOTS) return nullptr;
            if (head_ > tail) {
                if (head_ + need > size_) {
                    if (need >= tail) return nullptr;
                    head_ = 0;
                }
            } else if (head_ + need >= tail) {
                return nullptr;
            }
        }
        reserved_ = head_;
        used_.push_back({next_, head_});
        head_ += need;
        return base_ + reserved_;
    }

    void publish(uint64_t tag) {
        lane_.slots[next_ % SLOTS] = {reserved_, tag};
        lane_.published.store(++next_, std::memory_order_release);
    }

  private:
    struct Span {
        uint64_t chunk, at;
    };
    Lane& lane_;
    char* base_;
    uint64_t size_;
    std::vector<const Counter*> readers_;
    std::deque<Span> used_;
    uint64_t next_ = 0, head_ = 0, reserved_ = 0;
};

}  // namespace trident
