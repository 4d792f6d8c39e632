// Python's view of the engine: signatures, GIL, exceptions. The contract is dora/_C.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "collectives.h"
#include "engine.h"

namespace py = pybind11;

namespace dora {

namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

const char* wordOf(Outcome outcome) {
  constexpr const char* kWords[] = {"pending",   "done",     "timed_out", "cancelled",
                                    "peer_lost", "protocol", "closed"};
  return kWords[static_cast<std::size_t>(outcome)];
}

const char* wordOf(FrameType type) {
  constexpr const char* kWords[] = {"",     "data", "grant", "request", "cancel", "credit", "ack",
                                    "ping", "pong", "want",  "allow",   "revoke", "return", "bye"};
  return kWords[static_cast<std::size_t>(type)];
}

void* at(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

Priority priorityOf(int traffic_class, double deadline, std::uint64_t unit_bytes = 1) {
  if (unit_bytes == 0 || unit_bytes > kMaxUnitBytes) {
    throw std::invalid_argument("unit_bytes: given " + std::to_string(unit_bytes) +
                                ", allowed: 1 to " + std::to_string(kMaxUnitBytes));
  }
  if (traffic_class < 0 || traffic_class >= kNumClasses || !(deadline == deadline)) {
    throw std::invalid_argument("priority: given class " + std::to_string(traffic_class) +
                                ", deadline " + std::to_string(deadline) +
                                ", allowed: class 0 to 4 and a number");
  }
  return {static_cast<std::uint8_t>(traffic_class), deadline, unit_bytes};
}

MessageKey keyOf(std::uint32_t group, std::int32_t tag) {
  if (tag < 0) {
    throw std::invalid_argument("tag: given " + std::to_string(tag) + ", allowed: 0 or more");
  }
  return {group, tag, kCounted};
}

Team teamOf(std::vector<std::uint32_t> ranks, std::uint32_t group, int traffic_class,
            double deadline, double timeout_s) {
  return {std::move(ranks), group, priorityOf(traffic_class, deadline), timeout_s};
}

// An engine and the collectives on it, which end before it does.
struct PyEngine {
  explicit PyEngine(const EngineOptions& options)
      : engine(std::make_shared<Engine>(options)),
        collectives(std::make_unique<Collectives>(engine, options.rank)) {}

  ~PyEngine() {
    py::gil_scoped_release unlocked;
    close(0);
  }

  void close(double linger_s) {
    engine->close(linger_s);
    try {
      engine->checkUsable();
    } catch (const std::logic_error&) {
      (void)collectives.release();  // a forked child: its thread exists in the parent only
    } catch (const std::runtime_error&) {
      collectives.reset();
    }
  }

  Collectives& team() {
    engine->checkUsable();
    return *collectives;
  }

  std::shared_ptr<Engine> engine;
  std::unique_ptr<Collectives> collectives;
};

std::unique_ptr<PyEngine> makeEngine(std::uint32_t rank, const py::bytes& key, std::uint64_t job,
                                     std::uint32_t epoch, const std::string& protection,
                                     const std::string& host, std::uint16_t port,
                                     std::uint64_t eager_bytes, std::uint64_t eager_credit_bytes,
                                     double heartbeat_s, double dead_s, double connect_timeout_s,
                                     double aging_s, bool pacing, bool dscp,
                                     std::size_t log_frames, const std::string& buckets) {
  EngineOptions options;
  options.rank = rank;
  options.key = checkedKey(key);
  options.job = job;
  options.epoch = epoch;
  options.protection = protectionOf(protection);
  options.host = host;
  options.port = port;
  if (eager_bytes > kMinChunkBytes) {  // a small message is one chunk: it leaves whole or not at all
    throw std::invalid_argument("eager_bytes: given " + std::to_string(eager_bytes) +
                                ", allowed: 0 to " + std::to_string(kMinChunkBytes));
  }
  options.eager_bytes = eager_bytes;
  options.eager_credit_bytes = eager_credit_bytes;
  options.heartbeat_s = heartbeat_s;
  options.dead_s = dead_s;
  options.connect_timeout_s = connect_timeout_s;
  options.aging_s = aging_s;
  options.has_pacing = pacing;
  options.has_dscp = dscp;
  options.log_frames = log_frames;
  options.buckets = buckets;
  return std::make_unique<PyEngine>(options);
}

py::dict dictOf(const QueueStats& stats) {
  py::list classes;
  for (std::size_t i = 0; i < kNumClasses; ++i) {
    py::dict one;
    one["messages"] = stats.messages[i];
    one["bytes"] = stats.bytes[i];
    one["queue_s"] = stats.queue_s[i];
    classes.append(one);
  }
  py::dict all;
  all["classes"] = classes;
  all["preemptions"] = stats.preemptions;
  return all;
}

py::dict dictOf(const EngineStats& stats) {
  py::dict peers;
  for (const PeerStats& peer : stats.peers) {
    py::dict one;
    one["state"] = peer.state;
    one["lost_reason"] = peer.lost_reason;
    one["rate_bytes_per_s"] = peer.rate_bytes_per_s;
    one["rtt_s"] = peer.rtt_s;
    one["chunk_bytes"] = peer.chunk_bytes;
    one["bytes_sent"] = peer.bytes_sent;
    one["bytes_received"] = peer.bytes_received;
    one["unexpected_bytes"] = peer.unexpected_bytes;
    one["corrupt_frames"] = peer.corrupt_frames;
    one["urgent"] = dictOf(peer.urgent);
    one["bulk"] = dictOf(peer.bulk);
    peers[py::int_(peer.rank)] = one;
  }
  py::dict all;
  all["refused"] = stats.refused;
  all["protocol_errors"] = stats.protocol_errors;
  all["peers"] = peers;
  return all;
}

EngineStats statsOf(PyEngine& self) {
  py::gil_scoped_release unlocked;
  return self.engine->stats();
}

py::list logOf(PyEngine& self) {
  std::vector<LoggedFrame> frames;
  {
    py::gil_scoped_release unlocked;
    frames = self.engine->log();
  }
  py::list rows;
  for (const LoggedFrame& f : frames) {
    rows.append(py::make_tuple(f.start_s, f.end_s, f.is_sent, f.peer, wordOf(f.header.type),
                               f.header.traffic_class, f.header.group, f.header.tag, f.header.seq,
                               f.header.offset, f.header.length));
  }
  return rows;
}

void bindOperations(py::module_& m) {
  py::class_<CompletionQueue, std::shared_ptr<CompletionQueue>>(m, "CompletionQueue")
      .def(py::init<>())
      .def("take", &CompletionQueue::take, py::arg("timeout_s"), Unlocked())
      .def("close", &CompletionQueue::close)
      .def_property_readonly("is_closed", &CompletionQueue::isClosed);
  py::class_<Operation, OperationPtr>(m, "Operation")
      .def_readonly("id", &Operation::id)
      .def_property_readonly("source", [](const Operation& self) { return self.source.load(); })
      .def_property_readonly("outcome",
                             [](const Operation& self) { return wordOf(self.outcome()); })
      .def_property_readonly("error", &Operation::error)
      .def("is_done", &Operation::isDone)
      .def("wait", &Operation::wait, py::arg("timeout_s"), Unlocked())
      .def("notify", &Operation::notify, py::arg("queue"));
}

void bindMessages(py::class_<PyEngine>& engine) {
  engine
      .def(
          "send",
          [](PyEngine& self, std::uintptr_t address, std::uint64_t num_bytes, std::uint32_t dst,
             std::uint32_t group, std::int32_t tag, int traffic_class, double deadline,
             std::uint64_t unit_bytes, double timeout_s) {
            return self.engine->send(at(address), num_bytes, dst, keyOf(group, tag),
                                     priorityOf(traffic_class, deadline, unit_bytes), timeout_s);
          },
          py::arg("address"), py::arg("num_bytes"), py::arg("dst"), py::kw_only(),
          py::arg("group") = 0, py::arg("tag") = 0, py::arg("traffic_class") = 2,
          py::arg("deadline") = 0.0, py::arg("unit_bytes") = 1, py::arg("timeout_s") = 60.0,
          Unlocked())
      .def(
          "receive",
          [](PyEngine& self, std::uintptr_t address, std::uint64_t num_bytes, std::int32_t src,
             std::uint32_t group, std::int32_t tag, double timeout_s) {
            return self.engine->receive(at(address), num_bytes, src, keyOf(group, tag), timeout_s);
          },
          py::arg("address"), py::arg("num_bytes"), py::arg("src"), py::kw_only(),
          py::arg("group") = 0, py::arg("tag") = 0, py::arg("timeout_s") = 60.0, Unlocked())
      .def(
          "cancel",
          [](PyEngine& self, const OperationPtr& operation) {
            self.engine->cancel(operation);
            if (self.collectives) self.collectives->cancel(operation);
          },
          py::arg("operation"), Unlocked())
      .def(
          "reprioritise",
          [](PyEngine& self, const OperationPtr& operation, int traffic_class, double deadline) {
            self.engine->reprioritise(operation, priorityOf(traffic_class, deadline));
          },
          py::arg("operation"), py::arg("traffic_class"), py::arg("deadline") = 0.0, Unlocked());
}

void bindCollectives(py::class_<PyEngine>& engine) {
  engine
      .def(
          "all_reduce",
          [](PyEngine& self, std::uintptr_t address, std::size_t count, const std::string& dtype,
             const std::string& op, std::vector<std::uint32_t> ranks,
             const std::vector<double>& shares, std::uint32_t group, int traffic_class,
             double deadline, double timeout_s) {
            return self.team().allReduce(
                at(address), count, dataTypeOf(dtype), reduceOpOf(op), shares,
                teamOf(std::move(ranks), group, traffic_class, deadline, timeout_s));
          },
          py::arg("address"), py::arg("count"), py::arg("dtype"), py::arg("op"), py::arg("ranks"),
          py::kw_only(), py::arg("shares") = std::vector<double>(), py::arg("group") = 0,
          py::arg("traffic_class") = 3, py::arg("deadline") = 0.0, py::arg("timeout_s") = 60.0,
          Unlocked())
      .def(
          "reduce_scatter",
          [](PyEngine& self, std::uintptr_t input, std::uintptr_t output, std::size_t count,
             const std::string& dtype, const std::string& op, std::vector<std::uint32_t> ranks,
             std::uint32_t group, int traffic_class, double deadline, double timeout_s) {
            return self.team().reduceScatter(
                at(input), at(output), count, dataTypeOf(dtype), reduceOpOf(op),
                teamOf(std::move(ranks), group, traffic_class, deadline, timeout_s));
          },
          py::arg("input_address"), py::arg("output_address"), py::arg("count"), py::arg("dtype"),
          py::arg("op"), py::arg("ranks"), py::kw_only(), py::arg("group") = 0,
          py::arg("traffic_class") = 3, py::arg("deadline") = 0.0, py::arg("timeout_s") = 60.0,
          Unlocked())
      .def(
          "all_gather",
          [](PyEngine& self, std::uintptr_t input, std::uintptr_t output, std::uint64_t num_bytes,
             std::vector<std::uint32_t> ranks, std::uint32_t group, int traffic_class,
             double deadline, double timeout_s) {
            return self.team().allGather(
                at(input), at(output), num_bytes,
                teamOf(std::move(ranks), group, traffic_class, deadline, timeout_s));
          },
          py::arg("input_address"), py::arg("output_address"), py::arg("num_bytes"),
          py::arg("ranks"), py::kw_only(), py::arg("group") = 0, py::arg("traffic_class") = 3,
          py::arg("deadline") = 0.0, py::arg("timeout_s") = 60.0, Unlocked())
      .def(
          "broadcast",
          [](PyEngine& self, std::uintptr_t address, std::uint64_t num_bytes, std::uint32_t root,
             std::vector<std::uint32_t> ranks, std::uint32_t group, int traffic_class,
             double deadline, double timeout_s) {
            return self.team().broadcast(
                at(address), num_bytes, root,
                teamOf(std::move(ranks), group, traffic_class, deadline, timeout_s));
          },
          py::arg("address"), py::arg("num_bytes"), py::arg("root"), py::arg("ranks"),
          py::kw_only(), py::arg("group") = 0, py::arg("traffic_class") = 3,
          py::arg("deadline") = 0.0, py::arg("timeout_s") = 60.0, Unlocked())
      .def(
          "barrier",
          [](PyEngine& self, std::vector<std::uint32_t> ranks, std::uint32_t group,
             double timeout_s) {
            return self.team().barrier(teamOf(std::move(ranks), group, kUrgent, 0, timeout_s));
          },
          py::arg("ranks"), py::kw_only(), py::arg("group") = 0, py::arg("timeout_s") = 60.0,
          Unlocked());
}

void connect(PyEngine& self,
             const std::map<std::uint32_t, std::pair<std::string, std::uint16_t>>& peers,
             const std::map<std::uint32_t, std::vector<std::uint32_t>>& media,
             const std::map<std::uint32_t, std::uint32_t>& arbiters,
             const std::map<std::uint32_t, double>& rates) {
  std::map<std::uint32_t, PeerAddress> addresses;
  for (const auto& [rank, address] : peers) addresses[rank] = {address.first, address.second};
  self.engine->connect(addresses, {media, arbiters}, rates);
}

void bindEngine(py::module_& m) {
  py::class_<PyEngine> engine(m, "Engine");
  engine
      .def(py::init(&makeEngine), py::arg("rank"), py::arg("key"), py::kw_only(),
           py::arg("job") = 0, py::arg("epoch") = 0, py::arg("protection") = "checksum",
           py::arg("host") = "0.0.0.0", py::arg("port") = 0, py::arg("eager_bytes") = 16384,
           py::arg("eager_credit_bytes") = 4194304, py::arg("heartbeat_s") = 1.0,
           py::arg("dead_s") = 10.0, py::arg("connect_timeout_s") = 30.0,
           py::arg("aging_s") = 2.0, py::arg("pacing") = true, py::arg("dscp") = true,
           py::arg("log_frames") = 0, py::arg("buckets") = "")
      .def_property_readonly("port", [](const PyEngine& self) { return self.engine->port(); })
      .def_property_readonly("epoch", [](const PyEngine& self) { return self.engine->epoch(); })
      .def("connect", &connect, py::arg("peers"), py::kw_only(),
           py::arg("media") = std::map<std::uint32_t, std::vector<std::uint32_t>>(),
           py::arg("arbiters") = std::map<std::uint32_t, std::uint32_t>(),
           py::arg("rates") = std::map<std::uint32_t, double>(), Unlocked())
      .def(
          "wait_connected",
          [](PyEngine& self, double timeout_s) { return self.engine->waitConnected(timeout_s); },
          py::arg("timeout_s"), Unlocked())
      .def("events",
           [](PyEngine& self) {
             std::vector<std::tuple<std::string, std::int64_t, std::string>> rows;
             for (EngineEvent& event : self.engine->events()) {
               rows.emplace_back(event.kind, event.rank, event.text);
             }
             return rows;
           })
      .def(
          "reconfigure",
          [](PyEngine& self, std::uint32_t epoch) { self.engine->reconfigure(epoch); },
          py::arg("epoch"), Unlocked())
      .def("stats", [](PyEngine& self) { return dictOf(statsOf(self)); })
      .def("log", &logOf)
      .def("close", &PyEngine::close, py::arg("linger_s") = 1.0, Unlocked());
  bindMessages(engine);
  bindCollectives(engine);
}

}  // namespace

}  // namespace dora

PYBIND11_MODULE(_C, m) {
  m.doc() = "Dora's communication engine and simulation";
  dora::bindOperations(m);
  dora::bindEngine(m);
  dora::bindParts(m);
  dora::bindBuckets(m);
  dora::bindSimulation(m);
  dora::bindChains(m);
  dora::bindQuantize(m);
}
