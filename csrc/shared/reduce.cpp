// The loops of reduce.h, compiled for several CPU types with the macros of kernels/cpu/cpu.h.

#include "shared/reduce.h"

#include <stdexcept>

#include "kernels/cpu/cpu.h"

namespace trident {

INLINE int64_t wide(int64_t x) { return x; }
INLINE int32_t wide(int32_t x) { return x; }
INLINE uint8_t wide(uint8_t x) { return x; }

INLINE void put(int64_t& to, int64_t x) { to = x; }
INLINE void put(int32_t& to, int32_t x) { to = x; }
INLINE void put(uint8_t& to, uint8_t x) { to = x; }

namespace {

constexpr int64_t BLOCK = 1024;  // elements reduced at a time, so that they stay in the L1 cache

struct Sum {
    template <class W>
    static INLINE W join(W a, W b) {
        return W(a + b);
    }
    static INLINE int64_t join(int64_t a, int64_t b) { return int64_t(uint64_t(a) + uint64_t(b)); }  // wraps
    static INLINE int32_t join(int32_t a, int32_t b) { return int32_t(uint32_t(a) + uint32_t(b)); }
};
struct Max {
    template <class W>
    static INLINE W join(W a, W b) {
        return (b > a) | (b != b) ? b : a;
    }
};
struct Min {
    template <class W>
    static INLINE W join(W a, W b) {
        return (b < a) | (b != b) ? b : a;
    }
};

template <class Join, class T>
INLINE void over(const char* const* in, int n, char* to, int64_t count) {
    using W = decltype(wide(T()));
    W total[BLOCK];
    for (int64_t low = 0; low < count; low += BLOCK) {
        const int64_t many = std::min(BLOCK, count - low);
        const T* first = reinterpret_cast<const T*>(in[0]) + low;
        const T* second = reinterpret_cast<const T*>(in[1]) + low;
        T* out = reinterpret_cast<T*>(to) + low;
        for (int64_t i = 0; i < many; i++) total[i] = Join::join(wide(first[i]), wide(second[i]));
        for (int r = 2; r < n; r++) {
            const T* next = reinterpret_cast<const T*>(in[r]) + low;
            for (int64_t i = 0; i < many; i++) total[i] = Join::join(total[i], wide(next[i]));
        }
        for (int64_t i = 0; i < many; i++) put(out[i], total[i]);
    }
}

#define OVER(NAME, T)                                                                        \
    CLONES void NAME(int reduction, const char* const* in, int n, char* to, int64_t count) { \
        if (reduction == SUM) return over<Sum, T>(in, n, to, count);                         \
        reduction == MAX ? over<Max, T>(in, n, to, count) : over<Min, T>(in, n, to, count);  \
    }

OVER(over_f32, float)
OVER(over_f64, double)
OVER(over_bf16, bf16)
OVER(over_f16, f16)
OVER(over_i64, int64_t)
OVER(over_i32, int32_t)
OVER(over_u8, uint8_t)

}  // namespace

uint64_t size_of(Scalar kind) {
    constexpr uint64_t sizes[] = {4, 8, 2, 2, 8, 4, 1, 1};
    return sizes[int(kind)];
}

const char* name_of(uint64_t kind) {
    constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool"};
    return kind < 8 ? names[kind] : "?";
}

const char* reduction_name(uint64_t reduction) {
    constexpr const char* names[] = {"sum", "max", "min"};
    return reduction < 3 ? names[reduction] : "?";
}

void reduce(Scalar kind, int reduction, const char* const* in, int n, char* to, int64_t count) {
    switch (kind) {
        case Scalar::f32: return over_f32(reduction, in, n, to, count);
        case Scalar::f64: return over_f64(reduction, in, n, to, count);
        case Scalar::bf16: return over_bf16(reduction, in, n, to, count);
        case Scalar::f16: return over_f16(reduction, in, n, to, count);
        case Scalar::i64: return over_i64(reduction, in, n, to, count);
        case Scalar::i32: return over_i32(reduction, in, n, to, count);
        case Scalar::u8: return over_u8(reduction, in, n, to, count);
        case Scalar::b8: return over_u8(reduction == SUM ? int(MAX) : reduction, in, n, to, count);
    }
    throw std::invalid_argument("no such type");
}

}  // namespace trident
