// Python bindings of channel.h, for engine/distributed/shared_memory.py.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include "shared/channel.h"

namespace py = pybind11;

namespace {

using trident::Channel;

// The channels of this process; called with the GIL held. A fork gets a new object: the parent's channels do not belong
// to it, and the parent's mutex may stay locked indefinitely. Never freed, because channels may live as long as the
// process.
trident::Process& here() {
    static trident::Process* process = nullptr;
    static pid_t pid = 0;
    if (pid != getpid()) process = new trident::Process, pid = getpid();
    return *process;
}

std::unique_ptr<Channel> channel(int fd, uint64_t token, int rank, int ranks, uint64_t ring, uint64_t pair_ring,
                                 bool make, bool spin) {
    auto segment = std::make_shared<trident::Segment>(fd, token, ranks, ring, pair_ring, make);
    return std::make_unique<Channel>(std::move(segment), here(), rank, spin);
}

}  // namespace

PYBIND11_MODULE(_shared, m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.doc() = "Collectives between processes over shared memory; see engine/distributed/shared_memory.py.";
    py::class_<Channel>(m, "Channel")
        .def(py::init(&channel), py::arg("fd"), py::arg("token"), py::arg("rank"), py::arg("ranks"), py::arg("ring"),
             py::arg("pair_ring"), py::arg("make"), py::arg("spin"))
        .def("start", &Channel::start, release())
        .def("send", &Channel::send, release())
        .def("receive", &Channel::receive, release())
        .def("completed", &Channel::completed, release())
        .def("wait", &Channel::wait, release())
        .def("missing", &Channel::missing, release());
}
