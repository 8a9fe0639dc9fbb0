// Creates or opens the file of a segment, and maps it.

#include "shared/segment.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace trident {

namespace {

[[noreturn]] void fail(const char* call) { throw std::system_error(errno, std::generic_category(), call); }

}  // namespace

Segment::Segment(int fd, uint64_t token, int ranks, uint64_t ring, uint64_t pair_ring, bool make)
    : plan{uint64_t(ranks), ring, pair_ring} {
    if (ranks < 2 || ring < PAGE || ring % PAGE || pair_ring < PAGE || pair_ring % PAGE)
        throw std::invalid_argument("a segment needs at least two ranks, and rings of whole pages");
    if (make) {
        if (ftruncate(fd, off_t(plan.bytes()))) fail("ftruncate");
    } else {
        struct stat status;
        if (fstat(fd, &status)) fail("fstat");
        if (uint64_t(status.st_size) != plan.bytes()) throw std::runtime_error("not the segment of this group");
    }
    void* at = mmap(nullptr, plan.bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) fail("mmap");
    base_ = static_cast<char*>(at);
    Head& head = *reinterpret_cast<Head*>(base_);
    if (make) {
        head.token = token, head.ranks = plan.ranks, head.ring = ring, head.pair_ring = pair_ring;
        head.magic.store(MAGIC, std::memory_order_release);
    } else if (head.magic.load(std::memory_order_acquire) != MAGIC || head.token != token || head.ranks != plan.ranks ||
               head.ring != ring || head.pair_ring != pair_ring) {
        munmap(base_, plan.bytes());
        throw std::runtime_error("not the segment of this group");
    }
}

Segment::~Segment() { munmap(base_, plan.bytes()); }

}  // namespace trident
