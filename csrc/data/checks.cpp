// Consistency checks of a corpus when it is opened; engine/data/samples/indexed.py has the reference.

#include <thread>

#include "data/index.h"

namespace {

constexpr int64_t CHECKED = 4096;  // sequences checked at a time: the sum of their lengths cannot overflow

// Runs part(t) for t in [0, threads) in parallel, part(0) in this thread. part must not throw.
template <typename Part>
void in_parallel(int64_t threads, const Part& part) {
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; ++t) others.emplace_back(part, t);
    part(0);
    for (auto& other : others) other.join();
}

// Start of the first block of CHECKED sequences in [low, high) that fails the fast check, or high. The check: lengths
// are not negative, and each pointer is the previous one plus its bytes. Branch-free, so that it is vectorised.
int64_t first_doubt(const View<int32_t>& lengths, const View<int64_t>& pointers, int64_t itemsize, int64_t most,
                    int64_t low, int64_t high) {
    for (; low < high; low += CHECKED) {
        const int64_t last = std::min(low + CHECKED, high) - 1;
        uint64_t differ = 0, negative = 0;
        for (int64_t i = low; i < last; ++i) {
            const uint64_t length = uint32_t(lengths[i]);
            negative |= length;
            differ |= (uint64_t(pointers[i]) + length * uint64_t(itemsize)) ^ uint64_t(pointers[i + 1]);
        }
        const int64_t start = pointers[low], length = lengths[last], end = pointers[last];
        if (differ || negative >> 31 || length < 0 || start < 0 || end < start || end > most - length * itemsize)
            return low;
        if (last + 1 < high && pointers[last + 1] != end + length * itemsize) return low;
    }
    return high;
}

// (sequence, expected): the first sequence with a negative length (expected: -1), or whose pointer is not `expected`,
// the sum of the bytes before it; or (-1, total bytes). Stops soon after the sum exceeds `most` bytes.
py::tuple check_sequences(const py::array& length_array, const py::array& pointer_array, int64_t itemsize, int64_t most,
                          int64_t threads) {
    const View<int32_t> lengths(length_array, "lengths");
    const View<int64_t> pointers(pointer_array, "pointers");
    if (lengths.size != pointers.size || itemsize < 1 || itemsize > 8 || most < 0 || threads < 1)
        throw py::value_error("check_sequences: lengths and pointers differ in number, or a size is invalid");
    int64_t end = 0, wrong = -1, expected = 0;
    {
        py::gil_scoped_release release;
        const int64_t n = lengths.size, share = n / threads + 1;
        std::vector<int64_t> doubts(threads);
        const auto low_of = [&](int64_t t) { return std::min(n, t * share); };
        in_parallel(threads, [&](int64_t t) {
            doubts[t] = first_doubt(lengths, pointers, itemsize, most, low_of(t), low_of(t + 1));
        });
        int64_t i = 0;  // all sequences before it are valid and end at byte `end`
        for (int64_t t = 0; t < threads && i == low_of(t) && i < n && pointers[i] == end; ++t) {
            i = doubts[t];
            end = i == 0 ? 0 : pointers[i - 1] + lengths[i - 1] * itemsize;
        }
        for (; i < n && end <= most; ++i) {  // the remaining sequences one by one
            const int64_t length = lengths[i];
            if (length < 0 || pointers[i] != end) {
                wrong = i;
                expected = length < 0 ? -1 : end;
                break;
            }
            if (length > (MAX - end) / itemsize) {  // no file is that long: treated as more than `most`
                end = MAX;
                break;
            }
            end += length * itemsize;
        }
    }
    return py::make_tuple(wrong, wrong < 0 ? end : expected);
}

// The first boundary that is less than the one before it, or -1.
int64_t check_rising(const py::array& boundaries, int64_t threads) {
    const View<int64_t> view(boundaries, "boundaries");
    if (threads < 1) throw py::value_error("check_rising: threads must be at least 1");
    py::gil_scoped_release release;
    const int64_t share = view.size / threads + 1;
    std::vector<uint64_t> doubts(threads);
    in_parallel(threads, [&](int64_t t) {
        uint64_t doubt = 0;  // sign bit: a decrease, or a negative number, for which the difference might overflow
        for (int64_t i = t * share + 1, end = std::min(view.size, (t + 1) * share + 1); i < end; ++i) {
            const uint64_t before = uint64_t(view[i - 1]), here = uint64_t(view[i]);
            doubt |= before | here | (here - before);
        }
        doubts[t] = doubt;
    });
    uint64_t doubt = 0;
    for (const uint64_t each : doubts) doubt |= each;
    if (doubt >> 63)
        for (int64_t i = 1; i < view.size; ++i)
            if (view[i] < view[i - 1]) return i;
    return -1;
}

}  // namespace

void bind_checks(py::module_& m) {
    m.def("check_sequences", &check_sequences, py::arg("lengths"), py::arg("pointers"), py::arg("itemsize"),
          py::arg("most"), py::arg("threads") = 1);
    m.def("check_rising", &check_rising, py::arg("boundaries"), py::arg("threads") = 1);
}
