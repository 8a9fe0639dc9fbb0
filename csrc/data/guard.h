// Protects readers of mapped files that another process may truncate. Access to a page that no longer exists, or that
// the disk cannot read, raises SIGBUS, which would end the process without a message. For guarded memory the handler
// below maps a page of zeros in its place and records it: the reader continues, calls `lost` afterwards, and discards
// the data. Reads have no overhead. Faults in other memory are passed to the previous handler.

#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <mutex>
#include <stdexcept>

namespace guard {

struct Region {  // in the list below; never freed, as the handler may be reading it; end 0: free for reuse
    std::atomic<uintptr_t> begin{0}, end{0};
    std::atomic<int64_t> lost{-1};  // offset of the first missing page
    Region* next = nullptr;
};

static_assert(std::atomic<uintptr_t>::is_always_lock_free && std::atomic<int64_t>::is_always_lock_free);

inline std::atomic<Region*> regions{nullptr};
inline std::mutex changing;  // protects changes of the list and the handler; the handler itself takes no lock
inline struct sigaction before;
inline const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));

inline void on_bus_error(int number, siginfo_t* info, void*) {
    const uintptr_t at = uintptr_t(info->si_addr), first = at / page * page;
    for (Region* r = regions.load(); info->si_code > 0 && r != nullptr; r = r->next) {
        const uintptr_t begin = r->begin, end = r->end;
        if (at < begin || at >= (end + page - 1) / page * page) continue;
        const int error = errno;
        void* zeros =
            mmap(reinterpret_cast<void*>(first), page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        errno = error;
        if (zeros == MAP_FAILED) break;
        int64_t none = -1;
        r->lost.compare_exchange_strong(none, int64_t(first < begin ? 0 : first - begin));
        return;
    }
    sigaction(number, &before, nullptr);    // the access is repeated, with that handler
    if (info->si_code <= 0) raise(number);  // sent by a process: no access is repeated
}

// Guards [begin, begin + size); returns a token for `lost` and `release`.
inline intptr_t add(const void* begin, int64_t size) {
    const std::lock_guard<std::mutex> lock(changing);
    struct sigaction now;
    if (sigaction(SIGBUS, nullptr, &now) != 0) throw std::runtime_error("guard: no signal handlers here");
    if (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_bus_error) {
        before = now;
        struct sigaction ours = {};
        ours.sa_sigaction = on_bus_error;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&ours.sa_mask);
        sigaction(SIGBUS, &ours, nullptr);
    }
    Region* r = regions.load();
    while (r != nullptr && r->end != 0) r = r->next;
    if (r == nullptr) {
        r = new Region;
        r->next = regions.load();
        regions = r;
    }
    r->lost = -1;
    r->begin = uintptr_t(begin);
    r->end = uintptr_t(begin) + uintptr_t(size);
    return reinterpret_cast<intptr_t>(r);
}

inline int64_t lost(intptr_t token) { return reinterpret_cast<Region*>(token)->lost; }

inline void release(intptr_t token) { reinterpret_cast<Region*>(token)->end = 0; }

}  // namespace guard
