// The ranks of a group as threads of one process, for the sanitizers (tests/csrc/test_shared_sanitized.py). They run
// random collectives and messages over two links, with several in flight and waited for in random order, and compare
// each result with a direct computation. Rings are tiny, so that most operations exceed a ring and reach all of its
// edge cases.
//
// Each rank has a separate `Process`, so that no lock orders the ranks. All ranks use the same mapping of a segment,
// because the thread sanitizer identifies memory by its address. Every tensor is a heap block of its exact size.
//
//     shared_driver ROUNDS

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <thread>

#include "shared/channel.h"

using namespace trident;

namespace {

using Bytes = std::vector<char>;
using Random = std::mt19937_64;

int64_t pick(Random& random, int64_t low, int64_t high) { return std::uniform_int_distribution(low, high)(random); }

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    std::_Exit(1);
}

void must(bool good, const char* what) {
    if (!good) fail(what);
}

std::shared_ptr<Segment> segment(int ranks, uint64_t ring, uint64_t pair_ring) {
    const int file = memfd_create("driver", 0);
    must(file >= 0, "no memfd");
    auto made = std::make_shared<Segment>(file, 1, ranks, ring, pair_ring, true);
    close(file);
    return made;
}

// One operation, the same on all ranks.
struct Step {
    int link;
    Kind kind;
    Scalar type;
    int reduce;
    uint64_t total;
    int from, to;  // of a message
    uint64_t seed;
};

Step draw(Random& random, int ranks) {
    Step step;
    step.link = int(pick(random, 0, 1)), step.kind = Kind(pick(random, ALL_REDUCE, MESSAGE)), step.seed = random();
    step.type = Scalar(pick(random, 0, 7)), step.reduce = int(pick(random, 0, 2));
    step.from = int(pick(random, 0, ranks - 1));
    step.to = int((step.from + pick(random, 1, ranks - 1)) % ranks);
    const int64_t most[] = {0, 3, 100, 2000, 20000}, chosen = pick(random, 0, 4);
    step.total = uint64_t(pick(random, 0, most[chosen]));
    if (step.kind == ALL_REDUCE && chosen == 4)  // two rounds
        step.total = (1 << 16) / size_of(step.type) + step.total % 999 + 1;
    return step;
}

// Small integers, whose sums are exact in every type.
int number(const Step& step, int rank, uint64_t i) {
    uint64_t x = step.seed + 0x9e3779b97f4a7c15 * (i * 8 + uint64_t(rank) + 1);
    x = (x ^ x >> 29) * 0xbf58476d1ce4e5b9;
    const int y = int(x >> 40 & 31);
    return step.type == Scalar::b8 ? y & 1 : step.type == Scalar::u8 ? y : y - 16;
}

template <class T>
void store(char* to, T x) {
    std::memcpy(to, &x, sizeof x);
}

void write(Scalar kind, char* to, int x) {
    switch (kind) {
        case Scalar::f32: return store(to, float(x));
        case Scalar::f64: return store(to, double(x));
        case Scalar::bf16: return store(to, uint16_t(__builtin_bit_cast(uint32_t, float(x)) >> 16));
        case Scalar::f16: return store(to, _Float16(x));
        case Scalar::i64: return store(to, int64_t(x));
        case Scalar::i32: return store(to, int32_t(x));
        case Scalar::u8: return store(to, uint8_t(x));
        case Scalar::b8: return store(to, uint8_t(x));
    }
}

// Values [low, low + count) of a rank's input.
Bytes numbers(const Step& step, int rank, uint64_t low, uint64_t count) {
    const uint64_t size = size_of(step.type);
    Bytes bytes(count * size);
    for (uint64_t i = 0; i < count; i++) write(step.type, bytes.data() + i * size, number(step, rank, low + i));
    return bytes;
}

Bytes reduced(const Step& step, int ranks, uint64_t low, uint64_t count) {
    const uint64_t size = size_of(step.type);
    const int how = step.type == Scalar::b8 && step.reduce == SUM ? int(MAX) : step.reduce;
    Bytes bytes(count * size);
    for (uint64_t i = 0; i < count; i++) {
        int total = number(step, 0, low + i);
        for (int q = 1; q < ranks; q++) {
            const int x = number(step, q, low + i);
            total = how == SUM ? total + x : how == MAX ? std::max(total, x) : std::min(total, x);
        }
        write(step.type, bytes.data() + i * size, total);
    }
    return bytes;
}

uint64_t address(const Bytes& bytes) { return reinterpret_cast<uint64_t>(bytes.data()); }

// An operation in flight.
struct Work {
    Channel* channel;
    Queue queue;
    int peer;
    uint64_t number;
    Bytes from, to, expected;
};

// `me`: the rank; its position on the second link is different.
class Rank {
  public:
    Rank(const std::vector<std::shared_ptr<Segment>>& segments, int me, int ranks, bool spin, uint64_t seed)
        : me_(me), ranks_(ranks), own_(seed * 64 + uint64_t(me)) {
        for (size_t link = 0; link < segments.size(); link++)
            channels_.push_back(std::make_unique<Channel>(segments[link], process_, position(me, int(link)), spin));
    }

    void run(const std::vector<Step>& steps) {
        const size_t most[] = {0, 3, 12};
        for (const Step& step : steps) {
            if (pick(own_, 0, 9) == 0) std::this_thread::sleep_for(std::chrono::microseconds(pick(own_, 0, 300)));
            begin(step);
            while (pending_.size() > most[pick(own_, 0, 2)]) end();
        }
        while (!pending_.empty()) end();
    }

  private:
    int position(int rank, int link) const { return link ? ranks_ - 1 - rank : rank; }

    void begin(const Step& step) {
        Channel& channel = *channels_[size_t(step.link)];
        const int me = position(me_, step.link);
        const uint64_t n = uint64_t(ranks_), total = step.total, bytes = total * size_of(step.type);
        Work work{&channel, COLLECTIVES, 0, 0, {}, {}, {}};
        if (step.kind == MESSAGE) {
            if (me == step.from) {
                work.from = numbers(step, me, 0, total), work.queue = SENDS, work.peer = step.to;
                work.number = channel.send(address(work.from), bytes, step.to);
            } else if (me == step.to) {
                work.to.resize(bytes), work.queue = RECEIVES, work.peer = step.from;
                work.expected = numbers(step, step.from, 0, total);
                work.number = channel.receive(address(work.to), bytes, step.from);
            } else {
                return;
            }
        } else if (step.kind == ALL_REDUCE) {
            const bool in_place = pick(own_, 0, 1);
            (in_place ? work.to : work.from) = numbers(step, me, 0, total);
            work.to.resize(bytes);
            work.expected = reduced(step, ranks_, 0, total);
            work.number = start(channel, step, address(in_place ? work.to : work.from), address(work.to), total);
        } else if (step.kind == REDUCE_SCATTER) {
            work.from = numbers(step, me, 0, n * total);
            work.to.resize(bytes);
            work.expected = reduced(step, ranks_, uint64_t(me) * total, total);
            work.number = start(channel, step, address(work.from), address(work.to), total);
        } else {
            const bool in_place = pick(own_, 0, 1);
            work.from = numbers(step, me, 0, total);
            work.to.resize(n * bytes);
            const uint64_t part = address(work.to) + uint64_t(me) * bytes;
            if (in_place && bytes) std::memcpy(work.to.data() + uint64_t(me) * bytes, work.from.data(), bytes);
            for (int q = 0; q < ranks_; q++) {
                const Bytes theirs = numbers(step, q, 0, total);
                work.expected.insert(work.expected.end(), theirs.begin(), theirs.end());
            }
            work.number = start(channel, step, in_place ? part : address(work.from), address(work.to), bytes);
        }
        pending_.push_back(std::move(work));  // the blocks stay where they are
    }

    uint64_t start(Channel& channel, const Step& step, uint64_t from, uint64_t to, uint64_t total) {
        return channel.start(step.kind, int(step.type), step.reduce, from, to, total);
    }

    void end() {
        const auto which = pending_.begin() + pick(own_, 0, int64_t(pending_.size()) - 1);
        const Work work = std::move(*which);
        pending_.erase(which);
        for (int tries = 0; !work.channel->wait(work.queue, work.peer, work.number, 0.1); tries++)
            must(tries < 600, "an operation does not end");
        must(work.channel->completed(work.queue, work.peer) >= work.number, "complete, but not counted");
        must(work.queue == SENDS || work.to == work.expected, "a result is wrong");
    }

    const int me_, ranks_;
    Random own_;
    Process process_;
    std::vector<std::unique_ptr<Channel>> channels_;
    std::vector<Work> pending_;
};

void round(uint64_t seed) {
    Random random(seed);
    const int ranks = int(pick(random, 2, 4));
    const bool spin = pick(random, 0, 1);
    std::vector<std::shared_ptr<Segment>> segments;
    for (int link = 0; link < 2; link++)
        segments.push_back(segment(ranks, uint64_t(pick(random, 1, 3)) * PAGE, uint64_t(pick(random, 1, 3)) * PAGE));
    std::vector<Step> steps;
    for (int i = 0; i < 40; i++) steps.push_back(draw(random, ranks));
    std::vector<std::thread> threads;
    for (int me = 0; me < ranks; me++)
        threads.emplace_back([&, me] { Rank(segments, me, ranks, spin, seed).run(steps); });
    for (std::thread& thread : threads) thread.join();
}

// The counters and announcements of a segment's ranks.
Bytes announced(const Segment& segment) {
    const char* begin = reinterpret_cast<const char*>(&segment.member(0));
    return Bytes(begin, begin + segment.plan.bytes() - segment.plan.members());
}

template <class F>
std::string error_of(F call) {
    try {
        call();
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "";
}

// Every call must fail with `text`, without accessing the buffer, which has been freed.
void all_fail(Channel& channel, const std::string& text) {
    auto gone = std::make_unique<Bytes>(4096);
    const uint64_t at = address(*gone);
    gone.reset();
    must(error_of([&] { channel.start(ALL_REDUCE, 0, SUM, at, at, 4); }) == text, "start does not fail");
    must(error_of([&] { channel.send(at, 16, 1); }) == text, "send does not fail");
    must(error_of([&] { channel.receive(at, 16, 1); }) == text, "receive does not fail");
    must(error_of([&] { channel.wait(COLLECTIVES, 0, 1, 0.0); }) == text, "wait does not fail");
    must(error_of([&] { channel.completed(COLLECTIVES, 0); }) == text, "completed does not fail");
    must(error_of([&] { channel.missing(COLLECTIVES, 0); }) == text, "missing does not fail");
}

// Ranks 0 and 1 disagree on link `a`. Rank 0 notices it when it starts an operation on `b`, and then uses neither link
// again.
void disagree() {
    const auto a = segment(2, PAGE, PAGE), b = segment(2, PAGE, PAGE);
    Process one, two;
    Channel b0(b, one, 0, true), a0(a, one, 0, true), b1(b, two, 1, true), a1(a, two, 1, true);
    auto x = std::make_unique<Bytes>(4096), y = std::make_unique<Bytes>(4096);
    const auto sum = [](Channel& c, const Bytes& x) {
        return c.start(ALL_REDUCE, 0, SUM, address(x), address(x), 1024);
    };
    sum(b1, *y);
    a0.start(ALL_REDUCE, 0, MAX, address(*x), address(*x), 8);
    const std::string theirs = error_of([&] { a1.start(ALL_GATHER, 0, 0, address(*y), address(*y), 8); });
    const std::string ours = error_of([&] { sum(b0, *x); });
    must(ours ==
             "ranks disagree: position 1 of the group makes an all-gather of 8 x byte where position 0 makes an "
             "all-reduce of 8 x float32 (max)",
         "the disagreement is not reported");
    x.reset(), y.reset();
    const Bytes before_a = announced(*a), before_b = announced(*b);
    for (Channel* channel : {&b0, &a0}) all_fail(*channel, ours);
    for (Channel* channel : {&b1, &a1}) all_fail(*channel, theirs);
    must(before_a == announced(*a) && before_b == announced(*b), "a broken link writes");
}

// A forked child uses nothing of its parent and destroys its objects silently, even if a thread held the lock.
void fork_and_use() {
    const auto shared = segment(2, PAGE, PAGE);
    Process one, two;
    auto first = std::make_unique<Channel>(shared, one, 0, true);
    Channel second(shared, two, 1, true);
    Bytes x(400, 1), y(400, 2);
    first->start(ALL_GATHER, 0, 0, address(x), address(x), 200);
    const Bytes before = announced(*shared);
    one.mutex.lock();
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        all_fail(*first, "this link of shared memory belongs to the process that made it (" +
                             std::to_string(getppid()) + "); its fork (" + std::to_string(getpid()) +
                             ") cannot use it");
        first.reset();
        _exit(0);
    }
    one.mutex.unlock();
    int status = -1;
    must(waitpid(child, &status, 0) == child && status == 0, "the fork did not end well");
    must(before == announced(*shared), "a fork writes to its parent's segment");
    second.start(ALL_GATHER, 0, 0, address(y) + 200, address(y), 200);
    must(first->wait(COLLECTIVES, 0, 1, 1.0) && second.wait(COLLECTIVES, 0, 1, 1.0), "the parent's link is stuck");
    must(x == y && x[0] == 1 && x[399] == 2, "the parent's link gives something else");
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t rounds = argc > 1 ? uint64_t(std::atoll(argv[1])) : 10;
    disagree();
    fork_and_use();
    for (uint64_t i = 0; i < rounds; i++) round(i);
    std::printf("%d rounds\n", int(rounds));
}
