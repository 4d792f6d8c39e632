// Python's view of the simulation; the contract is dora/_C.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "pipeline_step.h"

namespace py = pybind11;

namespace dora {

namespace {

using namespace sim;
using Spans = std::vector<std::pair<double, double>>;
using Unlocked = py::call_guard<py::gil_scoped_release>;

Discipline disciplineOf(const std::string& word) {
  if (word == "priority") return Discipline::kPriority;
  if (word == "fair") return Discipline::kFair;
  throw py::value_error("discipline is '" + word + "'; use 'priority' or 'fair'");
}

Path pathOf(const std::vector<std::uint32_t>& media) {
  std::map<std::uint32_t, std::uint32_t> times;
  for (std::uint32_t medium : media) times[medium]++;
  Path path;
  for (auto [medium, count] : times) path.push_back({medium, count});
  return path;
}

Spans spansOf(const std::vector<Interval>& intervals) {
  Spans spans;
  for (const Interval& i : intervals) spans.emplace_back(i.start_s, i.end_s);
  return spans;
}

// A program together with the network that its transfers cross.
struct PyProgram {
  const Network* network;
  Program program;

  std::vector<Op>& rank(std::size_t index) { return program.ranks.at(index); }
  Transfer& transfer(std::size_t index) { return program.transfers.at(index); }
};

std::vector<double> sharedRates(const std::vector<std::pair<double, std::vector<double>>>& media,
                                const std::vector<std::vector<std::uint32_t>>& paths,
                                const std::vector<double>& order, const std::string& discipline) {
  std::vector<FluidMedium> known;
  for (const auto& [rate, efficiency] : media) known.push_back({rate, efficiency});
  std::vector<Path> crossed;
  for (const auto& path : paths) crossed.push_back(pathOf(path));
  std::vector<Flow> flows(paths.size());
  std::vector<Flow*> pointers;
  bool is_fair = disciplineOf(discipline) == Discipline::kFair;
  for (std::size_t f = 0; f < flows.size(); f++) {
    flows[f].path = &crossed[f];
    (is_fair ? flows[f].weight : flows[f].priority) = order.at(f);
    pointers.push_back(&flows[f]);
  }
  if (!is_fair)
    std::stable_sort(pointers.begin(), pointers.end(),
                     [](const Flow* a, const Flow* b) { return a->priority > b->priority; });
  shareMedia(known, disciplineOf(discipline), pointers);
  std::vector<double> rates;
  for (const Flow& flow : flows) rates.push_back(flow.rate_bytes_per_s);
  return rates;
}

void bindNetwork(py::module_& m) {
  m.def("share_media", &sharedRates, py::arg("media"), py::arg("paths"), py::arg("order"),
        py::arg("discipline"));
  py::class_<Network>(m, "Network")
      .def(py::init<std::size_t>(), py::arg("num_devices"))
      .def(
          "add_medium",
          [](Network& network, double rate_bytes_per_s, std::vector<double> efficiency) {
            if (efficiency.empty()) throw py::value_error("efficiency is empty");
            return network.addMedium({rate_bytes_per_s, std::move(efficiency)});
          },
          py::arg("rate_bytes_per_s"), py::arg("efficiency"))
      .def(
          "connect",
          [](Network& network, std::size_t src, std::size_t dst,
             const std::vector<std::uint32_t>& media, double latency_s) {
            network.connect(src, dst, pathOf(media), latency_s);
          },
          py::arg("src"), py::arg("dst"), py::arg("media"), py::arg("latency_s"))
      .def(
          "set_rest",
          [](Network& network, std::size_t device, double saved_s, double sprint) {
            if (!(saved_s >= 0 && sprint >= 1))
              throw py::value_error("a rest saves at least 0 s, at 1 times the speed or more");
            network.setRest(device, {saved_s, sprint});
          },
          py::arg("device"), py::arg("saved_s"), py::arg("sprint"));
}

void bindPlayed(py::module_& m) {
  py::class_<Played>(m, "Played")
      .def_readonly("end_s", &Played::end_s)
      .def_readonly("stuck", &Played::stuck)
      .def_readonly("busy_s", &Played::busy_s)
      .def_readonly("sent_bytes", &Played::sent_bytes)
      .def_readonly("received_bytes", &Played::received_bytes)
      .def_readonly("medium_busy_s", &Played::medium_busy_s)
      .def("ops", [](const Played& played, std::size_t rank) { return spansOf(played.ops.at(rank)); })
      .def("transfers", [](const Played& played) { return spansOf(played.transfers); });
}

void bindProgram(py::module_& m) {
  py::class_<PyProgram>(m, "Program")
      .def(py::init([](const Network& network, const std::string& discipline, double start_s) {
             PyProgram made{&network, emptyProgram(network, disciplineOf(discipline))};
             made.program.start_s = start_s;
             return made;
           }),
           py::arg("network"), py::arg("discipline") = "priority", py::arg("start_s") = 0.0,
           py::keep_alive<1, 2>())
      .def(
          "transfer",
          [](PyProgram& self, std::size_t src, std::size_t dst, double num_bytes, double priority,
             double pace_bytes_per_s, double not_before_s, bool is_input) {
            Transfer made = self.network->transfer(src, dst, num_bytes);
            made.priority = priority;
            if (pace_bytes_per_s > 0) made.pace_bytes_per_s = pace_bytes_per_s;
            made.not_before_s = not_before_s;
            made.needs_send = made.needs_receive = !is_input;
            self.program.transfers.push_back(made);
            return self.program.transfers.size() - 1;
          },
          py::arg("src"), py::arg("dst"), py::arg("num_bytes"), py::arg("priority") = 0.0,
          py::arg("pace_bytes_per_s") = 0.0, py::arg("not_before_s") = 0.0,
          py::arg("is_input") = false)
      .def(
          "compute",
          [](PyProgram& self, std::size_t rank, double duration_s, std::int32_t after,
             double not_before_s) {
            if (after != kNone) self.transfer(after);
            self.rank(rank).push_back({Op::kCompute, after, duration_s, not_before_s});
            return self.rank(rank).size() - 1;
          },
          py::arg("rank"), py::arg("duration_s"), py::arg("after") = kNone,
          py::arg("not_before_s") = 0.0)
      .def("send",
           [](PyProgram& self, std::size_t rank, std::int32_t transfer) {
             self.transfer(transfer);
             self.rank(rank).push_back({Op::kSend, transfer, 0, 0});
           })
      .def("receive",
           [](PyProgram& self, std::size_t rank, std::int32_t transfer) {
             self.transfer(transfer);
             self.rank(rank).push_back({Op::kReceive, transfer, 0, 0});
           })
      .def(
          "all_reduce",
          [](PyProgram& self, const std::vector<int>& ranks, double num_bytes) {
            appendAllReduce(self.program, *self.network, ranks, num_bytes);
          },
          py::arg("ranks"), py::arg("num_bytes"))
      .def(
          "change_rate",
          [](PyProgram& self, double at_s, std::uint32_t medium, double factor) {
            self.program.media->at(medium);
            self.program.changes.push_back({at_s, true, medium, factor});
          },
          py::arg("at_s"), py::arg("medium"), py::arg("factor"))
      .def(
          "change_speed",
          [](PyProgram& self, double at_s, std::uint32_t rank, double factor) {
            self.rank(rank);
            self.program.changes.push_back({at_s, false, rank, factor});
          },
          py::arg("at_s"), py::arg("rank"), py::arg("factor"))
      .def_property_readonly("num_transfers",
                             [](const PyProgram& self) { return self.program.transfers.size(); })
      .def("tails", [](const PyProgram& self) { return tails(self.program); }, Unlocked())
      .def("priorities", [](const PyProgram& self) { return priorities(self.program); }, Unlocked())
      .def("prioritise",
           [](PyProgram& self, const std::vector<double>& priorities) {
             for (std::size_t t = 0; t < priorities.size(); t++)
               self.transfer(t).priority = priorities[t];
           })
      .def("play", [](const PyProgram& self) { return play(self.program); }, Unlocked());
}

void bindPrice(py::module_& m) {
  py::class_<Price>(m, "Price")
      .def_readonly("makespan_s", &Price::makespan_s)
      .def_readonly("interval_s", &Price::interval_s)
      .def_readonly("busy_s", &Price::busy_s)
      .def_readonly("sent_bytes", &Price::sent_bytes)
      .def_readonly("received_bytes", &Price::received_bytes);
  py::class_<Step>(m, "Step")
      .def(py::init([](std::vector<std::vector<int>> devices,
                       std::vector<std::vector<double>> forward_s,
                       std::vector<std::vector<double>> backward_s, std::vector<double> down_bytes,
                       std::vector<double> up_bytes, std::vector<std::vector<int>> routes,
                       std::vector<int> warmup, std::string kind,
                       const std::vector<std::pair<std::vector<int>, double>>& reductions,
                       int source, double input_bytes, int prefetch) {
             Step step{std::move(devices), std::move(forward_s), std::move(backward_s),
                       std::move(down_bytes), std::move(up_bytes), std::move(routes),
                       std::move(warmup), std::move(kind), {}, source, input_bytes, prefetch};
             for (const auto& [members, num_bytes] : reductions)
               step.reductions.push_back({members, num_bytes});
             return step;
           }),
           py::arg("devices"), py::arg("forward_s"), py::arg("backward_s"), py::arg("down_bytes"),
           py::arg("up_bytes"), py::arg("routes"), py::arg("warmup"), py::arg("kind"),
           py::arg("reductions"), py::arg("source"), py::arg("input_bytes"), py::arg("prefetch"))
      .def("in_flight", &inFlight)
      .def(
          "price",
          [](const Step& step, const Network& network, const std::string& discipline) {
            return price(network, step, disciplineOf(discipline));
          },
          py::arg("network"), py::arg("discipline") = "priority");
}

}  // namespace

void bindSimulation(py::module_& m) {
  bindNetwork(m);
  bindPlayed(m);
  bindProgram(m);
  bindPrice(m);
}

}  // namespace dora
