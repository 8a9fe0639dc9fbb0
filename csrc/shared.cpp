// Collectives and messages between processes of one host over memory that they share (engine/shared.py). No torch.
//
// Goal: what gloo sends through the loopback in 7 ms is copied here in one. A segment holds, for each rank of a group, a
// ring of bytes that only this rank fills, and counters that only this rank raises; for each pair of ranks a smaller ring
// for messages. An operation is cut into chunks; the chunks of all collectives of a group form one sequence, the same on
// all ranks, since all call the same collectives in the same order. A rank
//   publishes  chunk t: copies what others need of its tensor into its ring, describes it, raises `published` to t + 1;
//   takes      chunk t when all have published it: adds or copies it into its result; in an all-reduce in two rounds it
//              adds only its own part, leaves the sum in its ring, and raises `summed` to t + 1;
//   finishes   chunk t (in two rounds: when all have summed it, copying their parts), raises `done` to t + 1.
// Room in a ring is used again when all ranks are done with what was there. No thread works in the background: whoever
// starts an operation does what can be done at once, and whoever waits, for whatever it is, does all that can be done in
// all segments of the process. So a rank that is blocked still serves the others, and nothing that a network with
// threads of its own would get through can stand still here; a rank that computes is served when it comes back.
//
// Order: a counter is stored with `release` after the bytes and the description that it announces were written, and
// loaded with `acquire` before they are read: a reader that sees the number sees the bytes. `done` is stored with
// `release` after the last read, and loaded with `acquire` before the room is written again: no write overtakes a read.
// Every counter has one writer. Sleeping: who waits says for whom (`waits_for`), looks once more, and sleeps on its own
// `bell`; who has raised a counter looks who waits for it, and rings. Both put a full fence between the store and the
// load, so that one of the two sees the other; a sleep is short in any case, because other segments may need serving.
//
// Sums are made in the order of ranks, in float32 for half precision, once for every element: the same bits on all ranks.
// A maximum or minimum with a NaN is NaN. What breaks if wrong: ranks that do not call the same operations in the same
// order read each other's bytes as something else; so each chunk carries what it is of, and a difference is an error.

#include <linux/futex.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "reduce.h"

namespace py = pybind11;

namespace {

using trident::Scalar;
using Clock = std::chrono::steady_clock;
using Counter = std::atomic<uint64_t>;
static_assert(Counter::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

constexpr uint64_t kLine = 64, kPage = 4096;
constexpr uint64_t kSlots = 64;  // chunks that a ring may hold at a time
constexpr uint64_t kChunk = 1 << 20;
constexpr uint64_t kOneRound = 1 << 16;  // bytes up to which every rank adds everything itself
constexpr uint64_t kMagic = 0x746e656469727431;
constexpr int64_t kSleepNs = 2'000'000;

enum What : uint64_t { kAllReduce = 1, kAllGather, kReduceScatter, kMessage };

struct Slot {
    uint64_t at, tag;
};

struct alignas(kLine) Lane {  // one writer's announcements
    alignas(kLine) Counter published;
    Slot slots[kSlots];
};

struct alignas(kLine) Member {
    Lane lane;
    alignas(kLine) Counter summed;
    alignas(kLine) Counter done;
    alignas(kLine) std::atomic<uint32_t> bell;
    std::atomic<uint32_t> waits_for;  // rank + 1; 0: nobody
};

struct alignas(kLine) Pair {
    Lane lane;
    alignas(kLine) Counter done;
};

struct Head {
    Counter magic;
    uint64_t token, ranks, ring, pair_ring;
};

uint64_t rounded(uint64_t x, uint64_t to) { return (x + to - 1) / to * to; }

// Where things lie in a segment.
struct Plan {
    uint64_t ranks, ring, pair_ring;
    uint64_t members() const { return kPage; }
    uint64_t pairs() const { return members() + rounded(ranks * sizeof(Member), kPage); }
    uint64_t rings() const { return pairs() + rounded(ranks * ranks * sizeof(Pair), kPage); }
    uint64_t pair_rings() const { return rings() + ranks * ring; }
    uint64_t bytes() const { return pair_rings() + ranks * ranks * pair_ring; }
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

    // Room for so many bytes, or null until readers have gone on.
    char* reserve(uint64_t bytes) {
        const uint64_t done = least_done(), need = rounded(std::max<uint64_t>(bytes, 1), kLine);
        while (!used_.empty() && used_.front().chunk < done) used_.pop_front();
        if (used_.empty()) {
            head_ = 0;  // the same pages again, which are in the cache
        } else {
            const uint64_t tail = used_.front().at;
            if (used_.size() >= kSlots) return nullptr;
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
        lane_.slots[next_ % kSlots] = {reserved_, tag};
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

struct Operation {
    What what;
    Scalar kind;
    int reduce;
    const char* from;
    char* to;
    uint64_t total, step;  // elements of one rank's part, and of one chunk of it
    bool two_rounds;

    uint64_t chunks() const { return (total + step - 1) / step; }
    uint64_t size() const { return trident::size_of(kind); }
    uint64_t tag() const { return uint64_t(what) << 56 | uint64_t(reduce) << 52 | uint64_t(kind) << 48 | total; }
};

std::string in_words(uint64_t tag) {
    const char* names[] = {"?", "all-reduce", "all-gather", "reduce-scatter", "message"};
    const uint64_t what = tag >> 56, kind = tag >> 48 & 15;
    return std::string(what == kAllReduce ? "an " : what == kAllGather ? "an " : "a ") + names[what <= 4 ? what : 0] +
           " of " + std::to_string(tag & ((1ull << 48) - 1)) + " x " +
           (what == kAllReduce || what == kReduceScatter ? trident::name_of(kind) : "byte") +
           (what == kAllReduce ? std::string(" (") + trident::reduction_name(tag >> 52 & 15) + ")" : "");
}

class Channel;

struct Process {  // what this process takes part in
    std::mutex mutex;
    std::vector<Channel*> channels;
};

Process& process() {
    static Process here;
    return here;
}

class Channel {
  public:
    // Makes a segment (fd: an empty file) or maps one. token: tells it from any other file.
    Channel(int fd, uint64_t token, int rank, int ranks, uint64_t ring, uint64_t pair_ring, bool make, bool spin)
        : me_(uint64_t(rank)), n_(uint64_t(ranks)), plan_{uint64_t(ranks), ring, pair_ring}, spin_(spin) {
        if (ranks < 2 || rank < 0 || rank >= ranks || ring < kPage || ring % kPage || pair_ring < kPage || pair_ring % kPage)
            throw std::invalid_argument("a segment is for two ranks or more, with rings of whole pages");
        if (make) {
            if (ftruncate(fd, off_t(plan_.bytes()))) throw std::system_error(errno, std::generic_category(), "ftruncate");
        } else {
            struct stat facts;
            if (fstat(fd, &facts)) throw std::system_error(errno, std::generic_category(), "fstat");
            if (uint64_t(facts.st_size) != plan_.bytes()) throw std::runtime_error("not the segment of this group");
        }
        void* at = mmap(nullptr, plan_.bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (at == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
        base_ = static_cast<char*>(at);
        Head& head = *reinterpret_cast<Head*>(base_);
        if (make) {
            head.token = token, head.ranks = n_, head.ring = ring, head.pair_ring = pair_ring;
            head.magic.store(kMagic, std::memory_order_release);
        } else if (head.magic.load(std::memory_order_acquire) != kMagic || head.token != token || head.ranks != n_ ||
                   head.ring != ring || head.pair_ring != pair_ring) {
            munmap(base_, plan_.bytes());
            throw std::runtime_error("not the segment of this group");
        }
        std::vector<const Counter*> all;
        for (uint64_t q = 0; q < n_; q++) all.push_back(&member(q).done);
        ring_ = std::make_unique<Ring>(member(me_).lane, data(me_), ring, all);
        for (uint64_t q = 0; q < n_; q++) {
            Pair& out = pair(me_, q);
            outgoing_.push_back({std::make_unique<Ring>(out.lane, pair_data(me_, q), pair_ring,
                                                        std::vector<const Counter*>{&out.done}), {}, 0, 0});
            incoming_.push_back({});
        }
        const std::lock_guard<std::mutex> guard(process().mutex);
        process().channels.push_back(this);
    }

    Channel(const Channel&) = delete;
    Channel& operator=(const Channel&) = delete;

    ~Channel() {
        {
            const std::lock_guard<std::mutex> guard(process().mutex);
            std::erase(process().channels, this);
        }
        munmap(base_, plan_.bytes());
    }

    // Starts a collective; returns its number, the first being 1.
    uint64_t start(int what, int kind, int reduce, uint64_t from, uint64_t to, uint64_t total) {
        const bool gather = what == kAllGather;
        Operation op{What(what), gather ? Scalar::u8 : Scalar(kind), gather ? 0 : reduce, reinterpret_cast<const char*>(from),
                     reinterpret_cast<char*>(to), total, 1, false};
        uint64_t chunk = std::min(kChunk, plan_.ring / 4) / op.size();
        if (what == kReduceScatter) chunk /= n_ - 1;
        op.step = std::max<uint64_t>(chunk, 1);
        op.two_rounds = what == kAllReduce && n_ > 2 && total * op.size() > kOneRound;
        const std::lock_guard<std::mutex> guard(process().mutex);
        ops_.push_back(op);
        started_++;
        progress_all();
        return started_;
    }

    uint64_t send(uint64_t from, uint64_t bytes, int peer) {
        const std::lock_guard<std::mutex> guard(process().mutex);
        Outgoing& o = outgoing_.at(size_t(peer));
        o.queue.push_back({reinterpret_cast<char*>(from), bytes, 0});
        o.started++;
        progress_all();
        return o.started;
    }

    uint64_t receive(uint64_t to, uint64_t bytes, int peer) {
        const std::lock_guard<std::mutex> guard(process().mutex);
        Incoming& i = incoming_.at(size_t(peer));
        i.queue.push_back({reinterpret_cast<char*>(to), bytes, 0});
        i.started++;
        progress_all();
        return i.started;
    }

    // How many operations of this sort are complete. sort: 0 collectives, 1 sends to the peer, 2 receives from it.
    uint64_t completed(int sort, int peer) {
        const std::lock_guard<std::mutex> guard(process().mutex);
        return complete(sort, size_t(peer));
    }

    // Works on everything until so many are complete (true), or for about so many seconds (false).
    bool wait(int sort, int peer, uint64_t number, double seconds) {
        const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
        int idle = 0;
        for (;;) {
            uint32_t bell, whom;
            {
                const std::lock_guard<std::mutex> guard(process().mutex);
                const bool any = progress_all();
                if (complete(sort, size_t(peer)) >= number) return true;
                if (any) idle = 0;
                bell = member(me_).bell.load(std::memory_order_acquire);
                const std::vector<int> missing = lacking(sort, peer);
                whom = missing.empty() ? 0 : uint32_t(missing[0]) + 1;
            }
            if (Clock::now() >= end) return false;
            if (idle++ < (spin_ ? 200 : 1)) {
                rest();
                continue;
            }
            member(me_).waits_for.store(whom, std::memory_order_seq_cst);
            std::atomic_thread_fence(std::memory_order_seq_cst);
            bool any;
            {
                const std::lock_guard<std::mutex> guard(process().mutex);
                any = progress_all() || complete(sort, size_t(peer)) >= number;
            }
            if (!any) sleep(bell);
            member(me_).waits_for.store(0, std::memory_order_relaxed);
        }
    }

    // The ranks whose next deed the oldest operation of this sort waits for.
    std::vector<int> missing(int sort, int peer) {
        const std::lock_guard<std::mutex> guard(process().mutex);
        return lacking(sort, peer);
    }

    bool progress() {
        if (!broken_.empty()) throw std::runtime_error(broken_);
        bool any = false, more = true;
        while (more) {
            more = publish();
            more |= take();
            more |= finish();
            any |= more;
        }
        for (uint64_t q = 0; q < n_; q++) {
            if (!outgoing_[q].queue.empty()) any |= push(outgoing_[q], q);
            if (!incoming_[q].queue.empty()) any |= pull(incoming_[q], q);
        }
        return any;
    }

  private:
    struct Cursor {  // a chunk of an operation, and its number in the group's sequence
        uint64_t op = 0, chunk = 0, number = 0;
    };
    struct Message {
        char* at;
        uint64_t bytes, moved;
    };
    struct Outgoing {
        std::unique_ptr<Ring> ring;
        std::deque<Message> queue;
        uint64_t started, finished;
    };
    struct Incoming {
        std::deque<Message> queue;
        uint64_t started = 0, finished = 0, next = 0;
    };

    Member& member(uint64_t q) const { return reinterpret_cast<Member*>(base_ + plan_.members())[q]; }
    Pair& pair(uint64_t from, uint64_t to) const {
        return reinterpret_cast<Pair*>(base_ + plan_.pairs())[from * n_ + to];
    }
    char* data(uint64_t q) const { return base_ + plan_.rings() + q * plan_.ring; }
    char* pair_data(uint64_t from, uint64_t to) const {
        return base_ + plan_.pair_rings() + (from * n_ + to) * plan_.pair_ring;
    }
    const Slot& slot(uint64_t q, uint64_t number) const { return member(q).lane.slots[number % kSlots]; }
    char* bytes_of(uint64_t q, uint64_t number) const { return data(q) + slot(q, number).at; }
    uint64_t published(uint64_t q) const { return member(q).lane.published.load(std::memory_order_acquire); }

    static bool progress_all() {
        bool any = false;
        for (Channel* channel : process().channels) any |= channel->progress();
        return any;
    }

    uint64_t complete(int sort, size_t peer) const {
        if (sort == 0) return first_;
        return sort == 1 ? outgoing_.at(peer).finished : incoming_.at(peer).finished;
    }

    std::vector<int> lacking(int sort, int peer) const {
        if (sort) return {peer};
        std::vector<int> found;
        const auto look = [&](auto behind) {
            for (uint64_t q = 0; q < n_ && found.size() < n_; q++)
                if (q != me_ && behind(q)) found.push_back(int(q));
        };
        if (done_.number < taken_.number) look([&](uint64_t q) { return member(q).summed.load() <= done_.number; });
        if (found.empty()) look([&](uint64_t q) { return published(q) <= taken_.number; });
        if (found.empty()) {
            const uint64_t least = ring_->least_done();
            look([&](uint64_t q) { return member(q).done.load() <= least; });
        }
        return found;
    }

    // The operation under a cursor, or null when all that was started is behind it.
    const Operation* at(Cursor& cursor) {
        if (cursor.op < first_) cursor.op = first_, cursor.chunk = 0;
        while (cursor.op < started_ && cursor.chunk >= ops_[cursor.op - first_].chunks()) cursor.op++, cursor.chunk = 0;
        return cursor.op < started_ ? &ops_[cursor.op - first_] : nullptr;
    }

    static void step(Cursor& cursor) { cursor.chunk++, cursor.number++; }

    void ring_bells() {
        std::atomic_thread_fence(std::memory_order_seq_cst);
        for (uint64_t q = 0; q < n_; q++) {
            Member& other = member(q);
            if (q == me_ || other.waits_for.load(std::memory_order_relaxed) != me_ + 1) continue;
            other.bell.fetch_add(1, std::memory_order_release);
            syscall(SYS_futex, &other.bell, FUTEX_WAKE, 1, nullptr, nullptr, 0);
        }
    }

    void sleep(uint32_t bell) {
        const timespec most{0, kSleepNs};
        syscall(SYS_futex, &member(me_).bell, FUTEX_WAIT, bell, &most, nullptr, 0);
    }

    void rest() const {
        if (!spin_) {
            sched_yield();
            return;
        }
        for (int i = 0; i < 20; i++) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#else
            std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
        }
    }

    bool publish() {
        bool any = false;
        while (const Operation* op = at(put_)) {
            const uint64_t low = put_.chunk * op->step, count = std::min(op->step, op->total - low), size = op->size();
            const bool scatter = op->what == kReduceScatter;
            char* room = ring_->reserve(count * size * (scatter ? n_ - 1 : 1));
            if (!room) break;
            if (!scatter)
                std::memcpy(room, op->from + low * size, count * size);
            else
                for (uint64_t q = 0; q < n_; q++)
                    if (q != me_)
                        std::memcpy(room + (q - (q > me_)) * count * size, op->from + (q * op->total + low) * size,
                                    count * size);
            ring_->publish(op->tag());
            ring_bells();
            step(put_);
            any = true;
        }
        return any;
    }

    bool take() {
        bool any = false;
        while (const Operation* op = at(taken_)) {
            if (taken_.number >= ring_->published()) break;
            bool there = true;
            for (uint64_t q = 0; q < n_ && there; q++) there = published(q) > taken_.number;
            if (!there) break;
            for (uint64_t q = 0; q < n_; q++) agree(slot(q, taken_.number).tag, op->tag(), q);
            const uint64_t low = taken_.chunk * op->step, count = std::min(op->step, op->total - low);
            if (op->what == kAllGather)
                gather(*op, low, count);
            else
                add(*op, low, count);
            step(taken_);
            if (op->two_rounds) {
                member(me_).summed.store(taken_.number, std::memory_order_release);
                ring_bells();
            }
            any = true;
        }
        return any;
    }

    void gather(const Operation& op, uint64_t low, uint64_t count) {
        for (uint64_t q = 0; q < n_; q++) {
            char* to = op.to + q * op.total + low;
            const char* from = q == me_ ? op.from + low : bytes_of(q, taken_.number);
            if (to != from) std::memcpy(to, from, count);
        }
    }

    void add(const Operation& op, uint64_t low, uint64_t count) {
        const uint64_t size = op.size();
        uint64_t begin = 0, end = count;
        if (op.two_rounds) begin = count * me_ / n_, end = count * (me_ + 1) / n_;
        const bool scatter = op.what == kReduceScatter;
        parts_.resize(n_);
        for (uint64_t q = 0; q < n_; q++) {
            if (q == me_)
                parts_[q] = op.from + ((scatter ? me_ * op.total : 0) + low + begin) * size;
            else
                parts_[q] = bytes_of(q, taken_.number) + (scatter ? (me_ - (me_ > q)) * count : begin) * size;
        }
        char* to = op.to + (low + begin) * size;
        trident::reduce(op.kind, op.reduce, parts_.data(), int(n_), to, int64_t(end - begin));
        if (op.two_rounds) std::memcpy(bytes_of(me_, taken_.number) + begin * size, to, (end - begin) * size);
    }

    bool summed() const {
        for (uint64_t q = 0; q < n_; q++)
            if (member(q).summed.load(std::memory_order_acquire) <= done_.number) return false;
        return true;
    }

    bool finish() {
        bool any = false;
        while (const Operation* op = at(done_)) {
            if (done_.number >= taken_.number || (op->two_rounds && !summed())) break;
            if (op->two_rounds) {
                const uint64_t low = done_.chunk * op->step, count = std::min(op->step, op->total - low);
                for (uint64_t q = 0; q < n_; q++) {
                    const uint64_t begin = count * q / n_ * op->size(), end = count * (q + 1) / n_ * op->size();
                    if (q != me_)
                        std::memcpy(op->to + low * op->size() + begin, bytes_of(q, done_.number) + begin, end - begin);
                }
            }
            step(done_);
            member(me_).done.store(done_.number, std::memory_order_release);
            any = true;
        }
        if (any) ring_bells();
        const uint64_t before = first_;
        while (first_ < started_ && (done_.op > first_ || done_.chunk >= ops_.front().chunks())) {
            if (done_.op == first_) done_.op++, done_.chunk = 0;
            ops_.pop_front();
            first_++;
        }
        return any || first_ > before;
    }

    static uint64_t message_tag(uint64_t bytes) { return uint64_t(kMessage) << 56 | bytes; }

    bool push(Outgoing& o, uint64_t q) {
        bool any = false;
        const uint64_t most = std::min(kChunk, plan_.pair_ring / 4);
        while (!o.queue.empty()) {
            Message& m = o.queue.front();
            while (m.moved < m.bytes) {
                const uint64_t count = std::min(most, m.bytes - m.moved);
                char* room = o.ring->reserve(count);
                if (!room) return any;
                std::memcpy(room, m.at + m.moved, count);
                o.ring->publish(message_tag(m.bytes));
                ring_bells();
                m.moved += count;
                any = true;
            }
            o.queue.pop_front();
            o.finished++;
            any = true;
        }
        return any;
    }

    bool pull(Incoming& i, uint64_t q) {
        bool any = false;
        Pair& from = pair(q, me_);
        const uint64_t most = std::min(kChunk, plan_.pair_ring / 4);
        while (!i.queue.empty()) {
            Message& m = i.queue.front();
            while (m.moved < m.bytes) {
                if (from.lane.published.load(std::memory_order_acquire) <= i.next) return any;
                const Slot& slot = from.lane.slots[i.next % kSlots];
                agree(slot.tag, message_tag(m.bytes), q);
                const uint64_t count = std::min(most, m.bytes - m.moved);
                std::memcpy(m.at + m.moved, pair_data(q, me_) + slot.at, count);
                from.done.store(++i.next, std::memory_order_release);
                ring_bells();
                m.moved += count;
                any = true;
            }
            i.queue.pop_front();
            i.finished++;
            any = true;
        }
        return any;
    }

    void agree(uint64_t theirs, uint64_t ours, uint64_t q) {
        if (theirs == ours) return;
        broken_ = "ranks disagree: position " + std::to_string(q) + " of the group makes " + in_words(theirs) +
                  " where position " + std::to_string(me_) + " makes " + in_words(ours);
        throw std::runtime_error(broken_);
    }

    const uint64_t me_, n_;
    const Plan plan_;
    const bool spin_;
    char* base_ = nullptr;
    std::unique_ptr<Ring> ring_;
    std::deque<Operation> ops_;          // from number first_ on
    uint64_t first_ = 0, started_ = 0;   // collectives that are complete, and that were started
    Cursor put_, taken_, done_;
    std::vector<Outgoing> outgoing_;
    std::vector<Incoming> incoming_;
    std::vector<const char*> parts_;
    std::string broken_;
};

}  // namespace

PYBIND11_MODULE(_shared, m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.doc() = "Collectives between processes over shared memory; see engine/shared.py.";
    py::class_<Channel>(m, "Channel")
        .def(py::init<int, uint64_t, int, int, uint64_t, uint64_t, bool, bool>(), py::arg("fd"), py::arg("token"),
             py::arg("rank"), py::arg("ranks"), py::arg("ring"), py::arg("pair_ring"), py::arg("make"), py::arg("spin"))
        .def("start", &Channel::start, release())
        .def("send", &Channel::send, release())
        .def("receive", &Channel::receive, release())
        .def("completed", &Channel::completed, release())
        .def("wait", &Channel::wait, release())
        .def("missing", &Channel::missing, release());
}
