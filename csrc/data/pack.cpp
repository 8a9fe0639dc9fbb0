// Packs the tokens that `engine prepare` writes, in one pass; engine/data/prepare/pack.py has the reference.

#include <optional>

#include "data/index.h"

namespace {

template <typename Out>
std::optional<int32_t> pack_into(const View<int32_t>& tokens, const std::vector<int32_t>& lengths, int32_t eod,
                                 Out* out, int64_t* counts, int64_t vocab_size) {
    int64_t i = 0;
    for (const int32_t length : lengths) {
        for (const int64_t end = i + length; i < end; ++i) {
            const int32_t token = tokens[i];
            if (token < 0 || token >= vocab_size) return token;
            ++counts[token];
            *out++ = Out(token);
        }
        if (eod >= 0 && length > 0) {
            ++counts[eod];
            *out++ = Out(eod);
        }
    }
    return std::nullopt;
}

// Copies the documents of `tokens` to `out`, with `eod` (-1: none) after each that is not empty, and adds their
// histogram to `counts`. Returns an id outside [0, size of counts), at which writing stops, or none.
std::optional<int32_t> pack(const py::array& tokens, const py::array& lengths, int32_t eod, py::array out,
                            py::array_t<int64_t> counts) {
    const View<int32_t> in(tokens, "tokens"), given(lengths, "lengths");
    const View<int64_t> histogram(counts, "counts");
    const bool narrow = py::isinstance<py::array_t<uint16_t>>(out);
    const int64_t capacity = narrow ? View<uint16_t>(out, "out").size : View<int32_t>(out, "out").size;
    std::vector<int32_t> sizes(given.size);  // a copy: the sizes checked are the sizes used
    int64_t needed = 0, written = 0;
    for (int64_t d = 0; d < given.size; ++d) {
        sizes[d] = given[d];
        if (sizes[d] < 0) throw py::value_error("pack: a length is negative");
        needed += sizes[d];
        written += int64_t(sizes[d]) + (eod >= 0 && sizes[d] > 0);
    }
    if (needed != in.size || written != capacity)
        throw py::index_error("pack: the lengths do not sum to the sizes of tokens and out");
    const int64_t vocab_size = histogram.size;
    if (narrow && vocab_size > 65536) throw py::value_error("pack: uint16 does not hold the ids of this vocabulary");
    if (eod >= vocab_size) return eod;
    int64_t* count = counts.mutable_data();  // raises ValueError if it is read-only
    void* target = out.mutable_data();
    py::gil_scoped_release release_gil;
    if (narrow) return pack_into(in, sizes, eod, static_cast<uint16_t*>(target), count, vocab_size);
    return pack_into(in, sizes, eod, static_cast<int32_t*>(target), count, vocab_size);
}

}  // namespace

void bind_pack(py::module_& m) {
    m.def("pack", &pack, py::arg("tokens"), py::arg("lengths"), py::arg("eod"), py::arg("out"),
          py::arg("counts").noconvert());
}
