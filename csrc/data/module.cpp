// engine._index: the performance-critical part of the data path. See index.h for its conventions.

#include "data/guard.h"
#include "data/index.h"

namespace {

py::array_t<int64_t> permute(uint64_t n, uint64_t key, const py::array& indices) {
    if (n == 0 || n > uint64_t(MAX)) throw py::value_error("permute: n must be in [1, 2^63)");
    const View<int64_t> in(indices, "indices");
    py::array_t<int64_t> result(in.size);
    int64_t* out = result.mutable_data();
    py::gil_scoped_release release;
    const Permutation p(n, key);
    for (int64_t i = 0; i < in.size; ++i) {
        const int64_t x = in[i];
        if (x < 0 || uint64_t(x) >= n)
            throw py::index_error("permute: index " + std::to_string(x) + " is not in [0, " + std::to_string(n) + ")");
        out[i] = int64_t(p(uint64_t(x)));
    }
    return result;
}

}  // namespace

PYBIND11_MODULE(_index, m) {
    m.doc() =
        "Sample order, batch gather and blends; see engine/data/samples/stream.py and blend.py for the definitions.";
    m.attr("interface") = 4;                     // _INTERFACE of engine/data/samples/native_index.py
    m.def("guard", [](const py::buffer& file) {  // token for lost and release
        const py::buffer_info info = file.request();
        return guard::add(info.ptr, info.size * info.itemsize);
    });
    m.def("lost", &guard::lost);
    m.def("release", &guard::release);
    m.def("permute", &permute, py::arg("n"), py::arg("key"), py::arg("indices"));
    bind_checks(m);
    bind_order(m);
    bind_blend(m);
    bind_pack(m);
}
