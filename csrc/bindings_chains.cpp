// Python's view of the search over chains of device groups; the contract is dora/_C.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "chains.h"

namespace py = pybind11;

namespace dora {

namespace {

using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Found = std::tuple<double, double, std::vector<std::int32_t>, std::vector<std::int32_t>>;

std::vector<double> valuesOf(const Array& array) {
  return {array.data(), array.data() + array.size()};
}

sim::ChainProblem problemOf(const py::dict& given) {
  auto array = [&](const char* key) { return valuesOf(given[key].cast<Array>()); };
  sim::ChainProblem p;
  p.num_devices = static_cast<int>(given["memory_bytes"].cast<Array>().size());
  p.num_blocks = static_cast<int>(given["boundary_bytes"].cast<Array>().size());
  p.num_microbatches = given["num_microbatches"].cast<int>();
  p.is_training = given["is_training"].cast<bool>();
  p.forward_s = array("forward_s");
  p.backward_s = array("backward_s");
  p.state_bytes = array("state_bytes");
  p.gradient_bytes = array("gradient_bytes");
  p.activation_bytes = array("activation_bytes");
  p.buffer_bytes = array("buffer_bytes");
  p.boundary_bytes = array("boundary_bytes");
  p.boundary_bytes.push_back(0);
  p.memory_bytes = array("memory_bytes");
  p.idle_w = array("idle_w");
  p.extra_w = array("extra_w");
  p.tx_j_per_byte = array("tx_j_per_byte");
  p.rx_j_per_byte = array("rx_j_per_byte");
  p.s_per_byte = array("s_per_byte");
  p.latency_s = array("latency_s");
  for (const auto& medium : given["medium_s_per_byte"].cast<std::vector<Array>>())
    p.medium_s_per_byte.push_back(valuesOf(medium));
  p.hops = given["hops"].cast<double>();
  p.source = given["source"].cast<int>();
  p.groups = given["groups"].cast<std::vector<std::vector<int>>>();
  p.twins = given["twins"].cast<std::vector<int>>();
  return p;
}

}  // namespace

void bindChains(py::module_& m) {
  m.def("share_microbatches", &sim::shareMicrobatches, py::arg("times_s"),
        py::arg("num_microbatches"));
  m.def(
      "enumerate_chains",
      [](const py::dict& given, bool by_energy, double cutoff_s, double cutoff_j,
         std::size_t width, std::size_t per_state) {
        sim::ChainProblem problem = problemOf(given);
        problem.by_energy = by_energy;
        problem.cutoff_s = cutoff_s;
        problem.cutoff_j = cutoff_j;
        problem.width = width;
        problem.per_state = per_state;
        sim::Chains chains;
        {
          py::gil_scoped_release unlocked;
          chains = sim::enumerateChains(problem);
        }
        std::vector<Found> found;
        for (sim::Chain& chain : chains.found)
          found.emplace_back(chain.bound_s, chain.bound_j, std::move(chain.groups),
                             std::move(chain.ends));
        return std::pair(found, chains.dropped_bound);
      },
      py::arg("problem"), py::arg("by_energy"), py::arg("cutoff_s"), py::arg("cutoff_j"),
      py::arg("width"), py::arg("per_state"));
}

}  // namespace dora
