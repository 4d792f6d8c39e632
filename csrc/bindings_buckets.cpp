// Python's view of an emulated network's media. The contract is dora/_C.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "bucket.h"
#include "reactor.h"

namespace py = pybind11;

namespace dora {

namespace {

using Paths =
    std::map<std::pair<std::uint32_t, std::uint32_t>, std::vector<std::uint32_t>>;

void create(const std::string& path, std::uint32_t num_devices, const std::vector<double>& rates,
            const Paths& paths) {
  Buckets::create(path, {num_devices, rates, paths}, nowS());
}

}  // namespace

void bindBuckets(py::module_& m) {
  py::class_<Buckets>(m, "Buckets")
      .def_static("create", &create, py::arg("path"), py::arg("num_devices"), py::arg("rates"),
                  py::arg("paths"))
      .def(py::init<const std::string&>(), py::arg("path"))
      .def(
          "set_rate",
          [](Buckets& self, std::uint32_t medium, double bytes_per_s) {
            self.setRate(medium, bytes_per_s, nowS());
          },
          py::arg("medium"), py::arg("bytes_per_s"))
      .def("set_connected", &Buckets::setConnected, py::arg("device"), py::arg("is_connected"))
      .def("has_joined", &Buckets::hasJoined, py::arg("device"))
      .def("rate", &Buckets::rate, py::arg("medium"))
      .def("carried_bytes", &Buckets::carriedBytes, py::arg("medium"))
      .def("sent_bytes", &Buckets::sentBytes, py::arg("device"))
      .def("received_bytes", &Buckets::receivedBytes, py::arg("device"));
}

}  // namespace dora
