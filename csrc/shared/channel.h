// One rank's part in the collectives and messages of a group over a segment. No torch, no Python.
//
// Goal: what gloo sends through the loopback in 7 ms is copied here in one. An operation is cut into chunks; the chunks
// of all collectives of a group form one sequence, the same on all ranks, since all call the same collectives in the same
// order. A rank
//   publishes  chunk t: copies what others need of its tensor into its ring, describes it, raises `published` to t + 1;
//   takes      chunk t when all have published it: adds or copies it into its result; in an all-reduce in two rounds it
//              adds only its own part, leaves the sum in its ring, and raises `summed` to t + 1;
//   finishes   chunk t (in two rounds: when all have summed it, copying their parts), raises `done` to t + 1.
// Room in a ring is used again when all ranks are done with what was there. In what order bytes and counters are written
// and read: segment.h.
//
// No thread works in the background: whoever starts an operation or waits for one does all that can be done on all links
// of its process. So a rank that waits on a link serves all links of its process; a rank that computes or waits in gloo
// is served when it comes back.
//
// Sleeping: who waits says for whom (`waits_for`), looks once more, and sleeps on its own `bell`; who has raised a counter
// looks who waits for it, and rings. Both put a full fence between the store and the load, so that one of the two sees
// the other; a sleep is short in any case, because other segments may need serving.
//
// Sums are made in the order of ranks, in float32 for half precision, once for every element: the same bits on all ranks.
// A maximum or minimum with a NaN is NaN. What breaks if wrong: ranks that do not call the same operations in the same
// order read each other's bytes as something else; so each chunk carries what it is of, and a difference is an error.
// After one no channel that the process had touches a segment or a tensor again: the call that failed may have been on
// another channel, whose operation nobody will wait for. Nor does a channel in a fork of its process: the counters have
// one writer, which is the parent.
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

enum What : uint64_t { ALL_REDUCE = 1, ALL_GATHER, REDUCE_SCATTER, MESSAGE };
enum Sort : int { COLLECTIVES = 0, SENDS, RECEIVES };  // what is counted: of the group, to a peer, from a peer

struct Operation {
    What what;
    Scalar kind;
    int reduce;
    const char* from;
    char* to;
    uint64_t total, step;  // elements of one rank's part, and of one chunk of it
    bool two_rounds;

    uint64_t chunks() const { return (total + step - 1) / step; }
    uint64_t size() const { return size_of(kind); }
    uint64_t tag() const { return uint64_t(what) << 56 | uint64_t(reduce) << 52 | uint64_t(kind) << 48 | total; }
};

class Channel;

struct Process {  // what a process takes part in
    std::mutex mutex;
    std::vector<Channel*> channels;
};

class Channel {
  public:
    Channel(std::shared_ptr<Segment> segment, Process& process, int rank, bool spin);
    ~Channel();
    Channel(const Channel&) = delete;
    Channel& operator=(const Channel&) = delete;

    // Starts a collective (`what`, `kind` and `reduce` as in the enumerations); returns its number, the first being 1.
    uint64_t start(int what, int kind, int reduce, uint64_t from, uint64_t to, uint64_t total);
    uint64_t send(uint64_t from, uint64_t bytes, int peer);
    uint64_t receive(uint64_t to, uint64_t bytes, int peer);

    // How many operations of this sort are complete.
    uint64_t completed(int sort, int peer);

    // Works on everything until so many are complete (true), or for about so many seconds (false).
    bool wait(int sort, int peer, uint64_t number, double seconds);

    // The ranks whose next deed the oldest operation of this sort waits for.
    std::vector<int> missing(int sort, int peer);

  private:
    struct Cursor {  // a chunk of an operation, and its number in the group's sequence
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
    uint64_t complete(int sort, size_t peer) const;
    std::vector<int> lacking(int sort, int peer) const;
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
    uint64_t first_ = 0, started_ = 0;  // collectives that are complete, and that were started
    Cursor put_, taken_, done_;
    std::vector<Outgoing> outgoing_;
    std::vector<Incoming> incoming_;
    std::vector<const char*> parts_;
    std::string broken_;  // why it is refused from now on
};

}  // namespace trident
