// Shared parts of engine._index: array views and the keyed permutation. No torch.
//
// The definitions and their reasons are in engine/data. The Python code there is the reference; tests check that both
// are bitwise equal. This code is fast and safe: no input, however wrong, makes it read outside the given arrays.
// Arrays are never converted, since that would copy a memory-mapped index of gigabytes, and are loaded bytewise,
// because the .idx header leaves them unaligned.
//
// Wrong shapes or dtypes raise ValueError, out-of-range numbers IndexError. The GIL is released in all loops.

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;
constexpr int ROUNDS = 8;  // even: computed two at a time
constexpr int64_t MAX = std::numeric_limits<int64_t>::max();

inline uint64_t mix64(uint64_t z) {  // the finaliser of splitmix64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

inline uint64_t derive(uint64_t key, uint64_t word) { return mix64(key ^ mix64(word + GOLDEN)); }

// Balanced Feistel network over the smallest domain of 2 * half bits that holds [0, n), with cycle walking.
struct Permutation {
    uint64_t n, mask, keys[ROUNDS];
    int half = 1;

    Permutation(uint64_t count, uint64_t key) : n(count) {
        while (half < 32 && (1ull << (2 * half)) < n) ++half;
        mask = (1ull << half) - 1;
        for (int r = 0; r < ROUNDS; ++r) keys[r] = mix64(key + uint64_t(r + 1) * GOLDEN);
    }

    uint64_t operator()(uint64_t x) const {  // x < n, which cycle walking keeps true; terminates as it is a bijection
        if (n == 1) return 0;
        do {
            uint64_t left = x >> half, right = x & mask;
            for (int r = 0; r < ROUNDS; r += 2) {
                left ^= mix64(right + keys[r]) & mask;
                right ^= mix64(left + keys[r + 1]) & mask;
            }
            x = (left << half) | right;
        } while (x >= n);
        return x;
    }

    uint64_t inverse(uint64_t x) const {  // the same rounds backwards, and cycle walking backwards
        if (n == 1) return 0;
        do {
            uint64_t left = x >> half, right = x & mask;
            for (int r = ROUNDS - 2; r >= 0; r -= 2) {
                right ^= mix64(left + keys[r + 1]) & mask;
                left ^= mix64(right + keys[r]) & mask;
            }
            x = (left << half) | right;
        } while (x >= n);
        return x;
    }
};

// A 1-D contiguous array of exactly T, possibly unaligned.
template <typename T>
struct View {
    const char* data;
    int64_t size;

    View(const py::array& a, const char* name) {
        if (!py::isinstance<py::array_t<T>>(a) || a.ndim() != 1 || (a.size() > 1 && a.strides(0) != sizeof(T)))
            throw py::value_error(std::string(name) + ": expected a contiguous 1-D array of " +
                                  std::string(py::str(py::dtype::of<T>())) + ", got " +
                                  std::string(py::str(a.dtype())) + " with " + std::to_string(a.ndim()) + " dims");
        data = static_cast<const char*>(a.data());
        size = a.size();
    }

    T operator[](int64_t i) const {
        T value;
        std::memcpy(&value, data + i * int64_t(sizeof(T)), sizeof(T));
        return value;
    }
};

void bind_checks(py::module_& m);  // checks.cpp: consistency checks when a corpus is opened
void bind_order(py::module_& m);   // order.cpp: the stream of an epoch, engine/data/samples/stream.py
void bind_blend(py::module_& m);   // blend.cpp: source of each sample, engine/data/samples/blend.py
void bind_pack(py::module_& m);    // pack.cpp: tokens to write, engine/data/prepare/pack.py
