// One rank's side of the collectives and messages of a group over a shared-memory segment. No torch, no Python.
//
// Goal: copy in 1 ms what gloo sends through the loopback in 7 ms. An operation is split into chunks. The chunks of all
// collectives of a group form one sequence, the same on all ranks, because all ranks call the same collectives in the
// same order. A rank
//   publishes  chunk t: copies the part of its tensor that others need into its ring, writes the chunk's tag, and sets
//              `published` to t + 1;
//   takes      chunk t once all ranks have published it: reduces or copies it into its result. In a two-round
//              all-reduce it reduces only its own part, leaves the sum in its ring, and sets `summed` to t + 1;
//   finishes   chunk t (in two rounds: once all have summed it, copies their parts), and sets `done` to t + 1.
// Space in a ring is reused once all ranks are done with its chunk. segment.h describes the memory order of bytes and
// counters.
//
// There is no background thread: every call that starts an operation or waits for one makes all possible progress on
// all links of its process. So a rank that waits on one link serves all links of its process. A rank that computes, or
// waits in gloo, makes progress in its next call.
//
// Sleeping: a waiting rank stores the rank that it waits for (`waits_for`), checks once more, and sleeps on its `bell`.
// A rank that has raised a counter checks who waits for it, and rings that bell. Both put a full fence between the
// store and the load, so that at least one of the two sees the other. Sleeps are short, because other segments may need
// progress.
//
// Sums are computed in the order of ranks, in float32 for half precision, once for every element, so they are bitwise
// equal on all ranks. A maximum or minimum with a NaN is NaN. What breaks if wrong: ranks that call different
// operations would misread each other's bytes. So each chunk carries a tag of its operation, and a mismatch is an
// error. After it no channel of the process touches a segment or a tensor again: the failed call may have been on
// another channel, whose operation is never waited for. A channel does nothing in a fork of its process either: each
// counter has one writer, the parent.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "shared/reduce.h"
#include "shared/segment.h"

namespace trident {

enum Kind : uint64_t { ALL_REDUCE = 1, ALL_GATHER, REDUCE_SCATTER, MESSAGE };
enum Queue : int { COLLECTIVES = 0, SENDS, RECEIVES };  // separately numbered: of the group, to a peer, from a peer

struct Operation {
    Kind kind;
    Scalar type;
    int reduce;
    const char* from;
    char* to;
    uint64_t total, step;  // elements of one rank's part, and of one chunk of it
    bool two_rounds;

    uint64_t chunks() const { return (total + step - 1) / step; }
    uint64_t size() const { return size_of(type); }
    uint64_t tag() const { return uint64_t(kind) << 56 | uint64_t(reduce) << 52 | uint64_t(type) << 48 | total; }
};

class Channel;

struct Process {  // all channels of a process, which progress together
    std::mutex mutex;
    std::vector<Channel*> channels;
};

class Channel {
  public:
    Channel(std::shared_ptr<Segment> segment, Process& process, int rank, bool spin);
    ~Channel();
    Channel(const Channel&) = delete;
    Channel& operator=(const Channel&) = delete;

    // Starts a collective (`kind`: Kind, `type`: Scalar, `reduce`: Reduction); returns its number, counted from 1.
    uint64_t start(int kind, int type, int reduce, uint64_t from, uint64_t to, uint64_t total);
    uint64_t send(uint64_t from, uint64_t bytes, int peer);
    uint64_t receive(uint64_t to, uint64_t bytes, int peer);

    // Number of operations of a queue that are complete.
    uint64_t completed(int queue, int peer);

    // Makes progress until `number` operations of the queue are complete (true) or about `seconds` have passed (false).
    bool wait(int queue, int peer, uint64_t number, double seconds);

    // The ranks for which the oldest operation of the queue waits.
    std::vector<int> missing(int queue, int peer);

  private:
    struct Cursor {  // position: operation, chunk of it, and the chunk's number in the group's sequence
        uint64_t op = 0, chunk = 0, number = 0;
        void step() { chunk++, number++; }
    };
    struct Message {
        char* at;
        uint64_t bytes, moved;
    };
    struct Outgoing {
        std::unique_ptr<Ring> ring;
        std::deque<Message> queue;
        uint64_t started = 0, finished = 0;
    };
    struct Incoming {
        std::deque<Message> queue;
        uint64_t started = 0, finished = 0, next = 0;
    };
    using Lock = std::unique_lock<std::mutex>;

    void refuse_forks() const;
    Lock enter() const;
    Lock lock() const;
    bool progress_all();
    bool progress();
    bool publish();
    bool take();
    void gather(const Operation& op, uint64_t low, uint64_t count);
    void add(const Operation& op, uint64_t low, uint64_t count);
    bool summed() const;
    bool finish();
    bool push(Outgoing& o);
    bool pull(Incoming& i, uint64_t q);
    void agree(uint64_t theirs, uint64_t ours, uint64_t q);
    uint64_t complete(int queue, size_t peer) const;
    std::vector<int> lacking(int queue, int peer) const;
    const Operation* at(Cursor& cursor);
    void ring_bells();
    void sleep(uint32_t bell);
    void rest() const;

    Member& member(uint64_t q) const { return segment_->member(q); }
    const Slot& slot(uint64_t q, uint64_t number) const { return member(q).lane.slots[number % SLOTS]; }
    char* bytes_of(uint64_t q, uint64_t number) const { return segment_->data(q) + slot(q, number).at; }
    uint64_t published(uint64_t q) const { return member(q).lane.published.load(std::memory_order_acquire); }

    const std::shared_ptr<Segment> segment_;
    Process& process_;
    const pid_t pid_;
    const uint64_t me_, n_;
    const bool spin_;
    std::unique_ptr<Ring> ring_;
    std::deque<Operation> ops_;         // from number first_ on
    uint64_t first_ = 0, started_ = 0;  // numbers of complete and of started collectives
    Cursor put_, taken_, done_;
    std::vector<Outgoing> outgoing_;
    std::vector<Incoming> incoming_;
    std::vector<const char*> parts_;
    std::string broken_;  // error of every further call, empty if none
};

}  // namespace trident
