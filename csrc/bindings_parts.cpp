// Python's view of the parts that need no network; the contract is dora/_C.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "arbiter.h"
#include "bindings.h"
#include "frame.h"
#include "handshake.h"
#include "rate.h"
#include "reduce.h"
#include "send_queue.h"

namespace py = pybind11;

namespace dora {

constexpr std::size_t kMinKeyBytes = 16;

namespace {

// The position of `word` in `words`, which are in the order of an enum.
std::size_t positionOf(const std::string& word, const char* what,
                       std::initializer_list<const char*> words) {
  std::string allowed;
  std::size_t position = 0;
  for (const char* one : words) {
    if (word == one) return position;
    allowed += (position++ ? ", " : "") + std::string(one);
  }
  throw py::value_error(std::string(what) + " is '" + word + "'; use one of: " + allowed);
}

void bindSendQueue(py::module_& m) {
  py::class_<SendQueue>(m, "SendQueue")
      .def(py::init<double, std::uint64_t>(), py::arg("aging_s"), py::arg("credit_bytes"))
      .def(
          "post",
          [](SendQueue& queue, std::uint64_t id, std::uint64_t num_bytes,
             std::uint8_t traffic_class, double deadline, double now_s, bool is_ready,
             std::uint64_t unit_bytes) {
            queue.post(id, num_bytes, {traffic_class, deadline, unit_bytes}, now_s, is_ready);
          },
          py::arg("id"), py::arg("num_bytes"), py::arg("traffic_class"), py::arg("deadline"),
          py::arg("now_s"), py::arg("is_ready") = true, py::arg("unit_bytes") = 1)
      .def("set_ready", &SendQueue::setReady, py::arg("id"))
      .def(
          "reprioritise",
          [](SendQueue& queue, std::uint64_t id, std::uint8_t traffic_class, double deadline) {
            return queue.reprioritise(id, {traffic_class, deadline});
          },
          py::arg("id"), py::arg("traffic_class"), py::arg("deadline"))
      .def("cancel", &SendQueue::cancel, py::arg("id"))
      .def(
          "next",
          [](SendQueue& queue, double now_s, std::uint64_t chunk_bytes) -> py::object {
            const auto chunk = queue.next(now_s, chunk_bytes);
            if (!chunk) return py::none();
            return py::make_tuple(chunk->id, chunk->offset, chunk->num_bytes, chunk->is_last);
          },
          py::arg("now_s"), py::arg("chunk_bytes"))
      .def("set_credit", &SendQueue::setCredit, py::arg("credit_bytes"))
      .def("acknowledge", &SendQueue::acknowledge, py::arg("num_bytes"))
      .def_property_readonly("outstanding", &SendQueue::outstanding)
      .def_property_readonly("queued_bytes", &SendQueue::queuedBytes)
      .def_property_readonly("preemptions",
                             [](const SendQueue& queue) { return queue.stats().preemptions; })
      .def("__len__", &SendQueue::size);
}

using NamedOrders = std::vector<std::pair<std::string, std::uint32_t>>;

NamedOrders named(const std::vector<Arbiter::Order>& orders) {
  NamedOrders result;
  for (const auto& order : orders) {
    result.emplace_back(order.kind == Arbiter::Kind::kAllow ? "allow" : "revoke", order.rank);
  }
  return result;
}

void bindArbiter(py::module_& m) {
  py::class_<Arbiter>(m, "Arbiter")
      .def(py::init<double>(), py::arg("aging_s"))
      .def(
          "want",
          [](Arbiter& arbiter, std::uint32_t rank, std::uint8_t traffic_class, double deadline,
             double now_s) { return named(arbiter.want(rank, {traffic_class, deadline}, now_s)); },
          py::arg("rank"), py::arg("traffic_class"), py::arg("deadline"), py::arg("now_s"))
      .def(
          "give_back",
          [](Arbiter& arbiter, std::uint32_t rank, double now_s) {
            return named(arbiter.giveBack(rank, now_s));
          },
          py::arg("rank"), py::arg("now_s"))
      .def(
          "tick", [](Arbiter& arbiter, double now_s) { return named(arbiter.tick(now_s)); },
          py::arg("now_s"))
      .def_property_readonly("holder", &Arbiter::holder);
}

void bindRateEstimator(py::module_& m) {
  py::class_<RateEstimator>(m, "RateEstimator")
      .def(py::init<>())
      .def("on_sent", &RateEstimator::onSent, py::arg("sent_bytes"), py::arg("now_s"))
      .def("on_idle", &RateEstimator::onIdle)
      .def("on_ack", &RateEstimator::onAck, py::arg("acked_bytes"), py::arg("now_s"))
      .def("on_queueing", &RateEstimator::onQueueing, py::arg("queue_s"), py::arg("now_s"))
      .def_property_readonly("rate_bytes_per_s", &RateEstimator::rateBytesPerS)
      .def_property_readonly("min_rtt_s", &RateEstimator::minRttS)
      .def("chunk_bytes", &RateEstimator::chunkBytes)
      .def("pace_bytes_per_s", &RateEstimator::paceBytesPerS, py::arg("now_s"));
}

const char* wordOf(Reject reason) {
  switch (reason) {
    case Reject::kNone: return "none";
    case Reject::kVersion: return "version";
    case Reject::kJob: return "job";
    case Reject::kEpoch: return "epoch";
    case Reject::kProtection: return "protection";
    case Reject::kMember: return "member";
    case Reject::kKey: return "key";
  }
  return "unknown";
}

// A RuntimeError with args (text, reason), the reason as an attribute, and str() the text alone.
void bindHandshakeError(py::module_& m) {
  static PYBIND11_CONSTINIT py::gil_safe_call_once_and_store<py::object> type;
  type.call_once_and_store_result([&] {
    return py::object(py::exception<HandshakeError>(m, "HandshakeError", PyExc_RuntimeError));
  });
  py::object error = type.get_stored();
  error.attr("__str__") = py::cpp_function(
      [](const py::object& self) -> py::object { return self.attr("args")[py::int_(0)]; },
      py::name("__str__"), py::is_method(error));
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const HandshakeError& failure) {
      const py::object& kind = type.get_stored();
      py::object value = kind(failure.what(), wordOf(failure.reason));
      value.attr("reason") = wordOf(failure.reason);
      PyErr_SetObject(kind.ptr(), value.ptr());
    } catch (const ProtocolError& failure) {
      PyErr_SetString(PyExc_ValueError, failure.what());
    }
  });
}

// The session can be taken from a handshake only once; Python may ask for its fields repeatedly.
class Authentication {
 public:
  explicit Authentication(Handshake handshake) : handshake_(std::move(handshake)) {}

  Handshake& handshake() { return handshake_; }

  const Session& session() {
    if (!session_) {
      if (!handshake_.done()) {
        throw std::runtime_error("the handshake is not done; exchange output and input first");
      }
      session_.emplace(handshake_.session());
    }
    return *session_;
  }

 private:
  Handshake handshake_;
  std::optional<Session> session_;
};

Identity identityOf(const std::string& key, std::uint64_t job, std::uint32_t epoch,
                    std::uint32_t rank, std::uint8_t lane, const std::string& protection) {
  Identity self;
  self.key = checkedKey(key);
  self.job = job;
  self.epoch = epoch;
  self.rank = rank;
  self.lane = lane;
  self.protection = protectionOf(protection);
  return self;
}

void bindHandshake(py::module_& m) {
  py::class_<Authentication>(m, "Handshake")
      .def_static(
          "initiate",
          [](const py::bytes& key, std::uint64_t job, std::uint32_t epoch, std::uint32_t rank,
             std::uint32_t peer_rank, std::uint8_t lane, const std::string& protection) {
            return Authentication(Handshake::initiate(
                identityOf(key, job, epoch, rank, lane, protection), peer_rank));
          },
          py::arg("key"), py::kw_only(), py::arg("job") = 0, py::arg("epoch") = 0, py::arg("rank"),
          py::arg("peer_rank"), py::arg("lane") = 0, py::arg("protection") = "checksum")
      .def_static(
          "respond",
          [](const py::bytes& key, std::uint64_t job, std::uint32_t epoch, std::uint32_t rank,
             const std::string& protection) {
            return Authentication(
                Handshake::respond(identityOf(key, job, epoch, rank, 0, protection)));
          },
          py::arg("key"), py::kw_only(), py::arg("job") = 0, py::arg("epoch") = 0, py::arg("rank"),
          py::arg("protection") = "checksum")
      .def("output", [](Authentication& self) { return py::bytes(self.handshake().output()); })
      .def_property_readonly("needed",
                             [](Authentication& self) { return self.handshake().needed(); })
      .def(
          "input",
          [](Authentication& self, const py::bytes& data) {
            const std::string_view view = data;
            self.handshake().input(view.data(), view.size());
          },
          py::arg("data"))
      .def_property_readonly("is_done",
                             [](Authentication& self) { return self.handshake().done(); })
      .def_property_readonly("peer_clock_s",
                             [](Authentication& self) { return self.session().peer_clock_s; })
      .def_property_readonly("peer_rank",
                             [](Authentication& self) { return self.session().peer_rank; });
  m.attr("PROBE_RANK") = kProbeRank;
}

py::bytes encode(std::uint8_t type, std::uint8_t traffic_class, std::uint8_t flags,
                 std::uint32_t group, std::int32_t tag, std::uint64_t seq, std::uint64_t offset,
                 std::uint64_t total, std::uint32_t length, std::uint32_t crc) {
  const FrameHeader header{static_cast<FrameType>(type), traffic_class, flags, group, tag, seq,
                           offset, total, length, crc};
  std::uint8_t fields[kFieldBytes];
  encodeFields(header, fields);
  return {reinterpret_cast<const char*>(fields), kFieldBytes};
}

py::dict decode(const py::bytes& data) {
  const std::string_view view = data;
  if (view.size() != kFieldBytes) {
    throw py::value_error("a header has 48 field bytes, not " + std::to_string(view.size()));
  }
  const auto header = decodeFields(reinterpret_cast<const std::uint8_t*>(view.data()));
  py::dict fields;
  fields["type"] = static_cast<int>(header.type);
  fields["traffic_class"] = header.traffic_class;
  fields["flags"] = header.flags;
  fields["group"] = header.group;
  fields["tag"] = header.tag;
  fields["seq"] = header.seq;
  fields["offset"] = header.offset;
  fields["total"] = header.total;
  fields["length"] = header.length;
  fields["crc"] = header.crc;
  return fields;
}

void bindFrame(py::module_& m) {
  m.attr("HEADER_BYTES") = kHeaderBytes;
  m.def(
      "crc32c",
      [](const py::bytes& data, std::uint32_t crc) {
        const std::string_view view = data;
        return crc32c(view.data(), view.size(), crc);
      },
      py::arg("data"), py::arg("crc") = 0);
  // Called with keywords, it refuses unknown names and numbers that do not fit.
  const py::object encode_keywords = py::cpp_function(
      &encode, py::name("encode_fields"), py::arg("type"), py::arg("traffic_class") = 0,
      py::arg("flags") = 0, py::arg("group") = 0, py::arg("tag") = 0, py::arg("seq") = 0,
      py::arg("offset") = 0, py::arg("total") = 0, py::arg("length") = 0, py::arg("crc") = 0);
  m.def(
      "encode_fields",
      [encode_keywords](const py::object& fields) -> py::object {
        return encode_keywords(**py::dict(fields));
      },
      py::arg("fields"));
  m.def("decode_fields", &decode, py::arg("data"));
}

void bindReduce(py::module_& m) {
  m.def(
      "reduce_into",
      [](std::uintptr_t into, std::uintptr_t other, std::size_t count, const std::string& dtype,
         const std::string& op) {
        reduceInto(reinterpret_cast<void*>(into), reinterpret_cast<const void*>(other), count,
                   dataTypeOf(dtype), reduceOpOf(op));
      },
      py::arg("into"), py::arg("other"), py::arg("count"), py::arg("dtype"), py::arg("op"),
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

Protection protectionOf(const std::string& word) {
  return static_cast<Protection>(
      positionOf(word, "protection", {"header", "checksum", "mac", "encrypt"}));
}

DataType dataTypeOf(const std::string& word) {
  return static_cast<DataType>(
      positionOf(word, "dtype", {"float32", "float64", "float16", "bfloat16", "int8", "uint8",
                                 "int16", "int32", "int64"}));
}

ReduceOp reduceOpOf(const std::string& word) {
  return static_cast<ReduceOp>(positionOf(word, "op", {"sum", "product", "min", "max"}));
}

std::string checkedKey(std::string key) {
  if (key.size() < kMinKeyBytes) {
    throw py::value_error("the key has " + std::to_string(key.size()) + " bytes; use at least " +
                          std::to_string(kMinKeyBytes) + " random ones, equal on all ranks");
  }
  return key;
}

void bindParts(py::module_& m) {
  bindSendQueue(m);
  bindArbiter(m);
  bindRateEstimator(m);
  bindHandshakeError(m);
  bindHandshake(m);
  bindFrame(m);
  bindReduce(m);
}

}  // namespace dora
