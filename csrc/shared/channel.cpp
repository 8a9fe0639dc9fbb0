// Implementation of channel.h.

#include "shared/channel.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <ctime>
#include <stdexcept>

namespace trident {

namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t CHUNK = 1 << 20;
constexpr uint64_t ONE_ROUND = 1 << 16;  // largest all-reduce in bytes that every rank reduces completely
constexpr int64_t SLEEP_NS = 2'000'000;

uint64_t message_tag(uint64_t bytes) { return uint64_t(MESSAGE) << 56 | bytes; }

std::string in_words(uint64_t tag) {
    const char* names[] = {"?", "all-reduce", "all-gather", "reduce-scatter", "message"};
    const uint64_t kind = tag >> 56, type = tag >> 48 & 15;
    return std::string(kind == ALL_REDUCE || kind == ALL_GATHER ? "an " : "a ") + names[kind <= 4 ? kind : 0] + " of " +
           std::to_string(tag & ((1ull << 48) - 1)) + " x " +
           (kind == ALL_REDUCE || kind == REDUCE_SCATTER ? name_of(type) : "byte") +
           (kind == ALL_REDUCE ? std::string(" (") + reduction_name(tag >> 52 & 15) + ")" : "");
}

}  // namespace

Channel::Channel(std::shared_ptr<Segment> segment, Process& process, int rank, bool spin)
    : segment_(std::move(segment)), process_(process), pid_(getpid()), me_(uint64_t(rank)), n_(segment_->plan.ranks),
      spin_(spin) {
    if (rank < 0 || me_ >= n_) throw std::invalid_argument("the rank is not in the group");
    std::vector<const Counter*> all;
    for (uint64_t q = 0; q < n_; q++) all.push_back(&member(q).done);
    ring_ = std::make_unique<Ring>(member(me_).lane, segment_->data(me_), segment_->plan.ring, all);
    for (uint64_t q = 0; q < n_; q++) {
        Pair& out = segment_->pair(me_, q);
        const std::vector<const Counter*> reader{&out.done};
        auto ring = std::make_unique<Ring>(out.lane, segment_->pair_data(me_, q), segment_->plan.pair_ring, reader);
        outgoing_.push_back({std::move(ring), {}, 0, 0});
        incoming_.push_back({});
    }
    const std::lock_guard<std::mutex> guard(process_.mutex);
    process_.channels.push_back(this);
}

Channel::~Channel() {
    if (getpid() != pid_) return;  // in a fork, only unmap the segment
    const std::lock_guard<std::mutex> guard(process_.mutex);
    std::erase(process_.channels, this);
}

void Channel::refuse_forks() const {
    if (const pid_t pid = getpid(); pid != pid_)
        throw std::runtime_error("this link of shared memory belongs to the process that made it (" +
                                 std::to_string(pid_) + "); its fork (" + std::to_string(pid) + ") cannot use it");
}

// The start of every call. It checks for forks before locking: in a fork the mutex may stay locked indefinitely.
Channel::Lock Channel::enter() const {
    refuse_forks();
    return lock();
}

Channel::Lock Channel::lock() const {
    Lock held(process_.mutex);
    if (!broken_.empty()) throw std::runtime_error(broken_);
    return held;
}

uint64_t Channel::start(int kind, int type, int reduce, uint64_t from, uint64_t to, uint64_t total) {
    const bool gather = kind == ALL_GATHER;
    Operation op{Kind(kind),
                 gather ? Scalar::u8 : Scalar(type),
                 gather ? 0 : reduce,
                 reinterpret_cast<const char*>(from),
                 reinterpret_cast<char*>(to),
                 total,
                 1,
                 false};
    uint64_t chunk = std::min(CHUNK, segment_->plan.ring / 4) / op.size();
    if (kind == REDUCE_SCATTER) chunk /= n_ - 1;
    op.step = std::max<uint64_t>(chunk, 1);
    op.two_rounds = kind == ALL_REDUCE && n_ > 2 && total * op.size() > ONE_ROUND;
    const Lock guard = enter();
    ops_.push_back(op);
    started_++;
    progress_all();
    return started_;
}

uint64_t Channel::send(uint64_t from, uint64_t bytes, int peer) {
    const Lock guard = enter();
    Outgoing& o = outgoing_.at(size_t(peer));
    o.queue.push_back({reinterpret_cast<char*>(from), bytes, 0});
    o.started++;
    progress_all();
    return o.started;
}

uint64_t Channel::receive(uint64_t to, uint64_t bytes, int peer) {
    const Lock guard = enter();
    Incoming& i = incoming_.at(size_t(peer));
    i.queue.push_back({reinterpret_cast<char*>(to), bytes, 0});
    i.started++;
    progress_all();
    return i.started;
}

uint64_t Channel::completed(int queue, int peer) {
    const Lock guard = enter();
    return complete(queue, size_t(peer));
}

bool Channel::wait(int queue, int peer, uint64_t number, double seconds) {
    const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    int idle = 0;
    refuse_forks();
    for (;;) {
        uint32_t bell, whom;
        {
            const Lock guard = lock();
            const bool any = progress_all();
            if (complete(queue, size_t(peer)) >= number) return true;
            if (any) idle = 0;
            bell = member(me_).bell.load(std::memory_order_acquire);
            const std::vector<int> missing = lacking(queue, peer);
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
            const Lock guard = lock();
            any = progress_all() || complete(queue, size_t(peer)) >= number;
        }
        if (!any) sleep(bell);
        member(me_).waits_for.store(0, std::memory_order_relaxed);
    }
}

std::vector<int> Channel::missing(int queue, int peer) {
    const Lock guard = enter();
    return lacking(queue, peer);
}

bool Channel::progress() {
    bool any = false, more = true;
    while (more) {
        more = publish();
        more |= take();
        more |= finish();
        any |= more;
    }
    for (uint64_t q = 0; q < n_; q++) {
        if (!outgoing_[q].queue.empty()) any |= push(outgoing_[q]);
        if (!incoming_[q].queue.empty()) any |= pull(incoming_[q], q);
    }
    return any;
}

bool Channel::progress_all() {
    bool any = false;
    for (Channel* channel : process_.channels) any |= channel->progress();
    return any;
}

uint64_t Channel::complete(int queue, size_t peer) const {
    if (queue == COLLECTIVES) return first_;
    return queue == SENDS ? outgoing_.at(peer).finished : incoming_.at(peer).finished;
}

std::vector<int> Channel::lacking(int queue, int peer) const {
    if (queue != COLLECTIVES) return {peer};
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

// The operation at a cursor; null if the cursor is past the last started one.
const Operation* Channel::at(Cursor& cursor) {
    if (cursor.op < first_) cursor.op = first_, cursor.chunk = 0;
    while (cursor.op < started_ && cursor.chunk >= ops_[cursor.op - first_].chunks()) cursor.op++, cursor.chunk = 0;
    return cursor.op < started_ ? &ops_[cursor.op - first_] : nullptr;
}

void Channel::ring_bells() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    for (uint64_t q = 0; q < n_; q++) {
        Member& other = member(q);
        if (q == me_ || other.waits_for.load(std::memory_order_relaxed) != me_ + 1) continue;
        other.bell.fetch_add(1, std::memory_order_release);
        syscall(SYS_futex, &other.bell, FUTEX_WAKE, 1, nullptr, nullptr, 0);
    }
}

void Channel::sleep(uint32_t bell) {
    const timespec most{0, SLEEP_NS};
    syscall(SYS_futex, &member(me_).bell, FUTEX_WAIT, bell, &most, nullptr, 0);
}

void Channel::rest() const {
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

bool Channel::publish() {
    bool any = false;
    while (const Operation* op = at(put_)) {
        const uint64_t low = put_.chunk * op->step, count = std::min(op->step, op->total - low), size = op->size();
        const bool scatter = op->kind == REDUCE_SCATTER;
        char* space = ring_->reserve(count * size * (scatter ? n_ - 1 : 1));
        if (!space) break;
        if (!scatter)
            std::memcpy(space, op->from + low * size, count * size);
        else
            for (uint64_t q = 0; q < n_; q++)
                if (q != me_)
                    std::memcpy(space + (q - (q > me_)) * count * size, op->from + (q * op->total + low) * size,
                                count * size);
        ring_->publish(op->tag());
        ring_bells();
        put_.step();
        any = true;
    }
    return any;
}

bool Channel::take() {
    bool any = false;
    while (const Operation* op = at(taken_)) {
        if (taken_.number >= ring_->published()) break;
        bool there = true;
        for (uint64_t q = 0; q < n_ && there; q++) there = published(q) > taken_.number;
        if (!there) break;
        for (uint64_t q = 0; q < n_; q++) agree(slot(q, taken_.number).tag, op->tag(), q);
        const uint64_t low = taken_.chunk * op->step, count = std::min(op->step, op->total - low);
        if (op->kind == ALL_GATHER)
            gather(*op, low, count);
        else
            add(*op, low, count);
        taken_.step();
        if (op->two_rounds) {
            member(me_).summed.store(taken_.number, std::memory_order_release);
            ring_bells();
        }
        any = true;
    }
    return any;
}

void Channel::gather(const Operation& op, uint64_t low, uint64_t count) {
    for (uint64_t q = 0; q < n_; q++) {
        char* to = op.to + q * op.total + low;
        const char* from = q == me_ ? op.from + low : bytes_of(q, taken_.number);
        if (to != from) std::memcpy(to, from, count);
    }
}

void Channel::add(const Operation& op, uint64_t low, uint64_t count) {
    const uint64_t size = op.size();
    uint64_t begin = 0, end = count;
    if (op.two_rounds) begin = count * me_ / n_, end = count * (me_ + 1) / n_;
    const bool scatter = op.kind == REDUCE_SCATTER;
    parts_.resize(n_);
    for (uint64_t q = 0; q < n_; q++) {
        if (q == me_)
            parts_[q] = op.from + ((scatter ? me_ * op.total : 0) + low + begin) * size;
        else
            parts_[q] = bytes_of(q, taken_.number) + (scatter ? (me_ - (me_ > q)) * count : begin) * size;
    }
    char* to = op.to + (low + begin) * size;
    reduce(op.type, op.reduce, parts_.data(), int(n_), to, int64_t(end - begin));
    if (op.two_rounds) std::memcpy(bytes_of(me_, taken_.number) + begin * size, to, (end - begin) * size);
}

bool Channel::summed() const {
    for (uint64_t q = 0; q < n_; q++)
        if (member(q).summed.load(std::memory_order_acquire) <= done_.number) return false;
    return true;
}

bool Channel::finish() {
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
        done_.step();
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

bool Channel::push(Outgoing& o) {
    bool any = false;
    const uint64_t most = std::min(CHUNK, segment_->plan.pair_ring / 4);
    while (!o.queue.empty()) {
        Message& m = o.queue.front();
        while (m.moved < m.bytes) {
            const uint64_t count = std::min(most, m.bytes - m.moved);
            char* space = o.ring->reserve(count);
            if (!space) return any;
            std::memcpy(space, m.at + m.moved, count);
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

bool Channel::pull(Incoming& i, uint64_t q) {
    bool any = false;
    Pair& from = segment_->pair(q, me_);
    const uint64_t most = std::min(CHUNK, segment_->plan.pair_ring / 4);
    while (!i.queue.empty()) {
        Message& m = i.queue.front();
        while (m.moved < m.bytes) {
            if (from.lane.published.load(std::memory_order_acquire) <= i.next) return any;
            const Slot& slot = from.lane.slots[i.next % SLOTS];
            agree(slot.tag, message_tag(m.bytes), q);
            const uint64_t count = std::min(most, m.bytes - m.moved);
            std::memcpy(m.at + m.moved, segment_->pair_data(q, me_) + slot.at, count);
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

void Channel::agree(uint64_t theirs, uint64_t ours, uint64_t q) {
    if (theirs == ours) return;
    const std::string text = "ranks disagree: position " + std::to_string(q) + " of the group makes " +
                             in_words(theirs) + " where position " + std::to_string(me_) + " makes " + in_words(ours);
    for (Channel* channel : process_.channels) channel->broken_ = text;
    throw std::runtime_error(text);
}

}  // namespace trident
