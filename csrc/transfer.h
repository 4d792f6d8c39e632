// One message under way, and what both directions of a peer need of its connections.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "connection.h"
#include "operation.h"

namespace dora {

// A posted send or receive. Fields beside those of Operation belong to whoever holds the engine's
// state.
struct Transfer : Operation {
  using Operation::Operation;

  bool is_send = false;
  std::uint32_t self = 0;
  std::int32_t peer = kAnySource;
  std::uint8_t* data = nullptr;  // a send only reads it
  std::uint64_t num_bytes = 0;
  MessageKey key;
  Priority priority;
  double timeout_s = 0;

  // "rank 0: send of 4096 bytes to rank 1 (tag 3): REASON"
  std::string explain(const std::string& reason) const;
  void fail(Outcome outcome, const std::string& reason) { finish(outcome, explain(reason)); }
};

using TransferPtr = std::shared_ptr<Transfer>;

inline bool operator==(const MessageKey& a, const MessageKey& b) {
  return a.group == b.group && a.tag == b.tag && a.seq == b.seq;
}

struct KeyHash {
  std::size_t operator()(const MessageKey& key) const {
    std::uint64_t mixed = key.seq * 0x9e3779b97f4a7c15ull + key.group;
    mixed = (mixed ^ (mixed >> 29)) * 0xbf58476d1ce4e5b9ull + static_cast<std::uint32_t>(key.tag);
    return static_cast<std::size_t>(mixed ^ (mixed >> 32));
  }
};

template <typename Value>
using KeyMap = std::unordered_map<MessageKey, Value, KeyHash>;

inline MessageKey keyOf(const FrameHeader& header) { return {header.group, header.tag, header.seq}; }

// Counts messages per (group, tag) in the order of posting, the same on both ends.
class PostCounter {
 public:
  void count(MessageKey& key);                      // fills in a kCounted seq
  bool isPast(const MessageKey& key) const;         // was it posted already? false for tags < 0
  MessageKey next(MessageKey key) const;            // as `count` would fill it in
  bool isNext(const MessageKey& key) const { return next({key.group, key.tag}) == key; }

 private:
  std::unordered_map<std::uint64_t, std::uint64_t> next_;
};

// What a message costs of the eager credit: its bytes and the bookkeeping.
inline std::uint64_t eagerCharge(std::uint64_t num_bytes) { return num_bytes + 256; }

// What both ends are told when a message does not fit its receive.
std::string sizeMismatch(std::uint64_t sent, std::uint64_t expected);

// Facts about unknown messages that a peer may make this rank remember.
constexpr std::size_t kMaxRemembered = 65536;

// The two connections to a peer: urgent messages and control frames on one, bulk on the other, so
// that what is urgent never waits in a socket behind bulk.
struct Lanes {
  static constexpr int kUrgentLane = 0, kBulkLane = 1;
  std::array<std::unique_ptr<Connection>, 2> lane;

  // Before the urgent lane is there, control frames wait for it.
  void control(const FrameHeader& header, const std::string& payload = "");
  void attach(int number, std::unique_ptr<Connection> connection);
  void drop();
  void control(FrameType type, const MessageKey& key, std::uint64_t total, std::uint8_t flags = 0,
               const std::string& payload = "");

 private:
  std::vector<std::pair<FrameHeader, std::string>> early_;
  bool is_dropped_ = false;
};

struct EngineOptions {
  std::uint32_t rank = 0;
  std::string key;
  std::uint64_t job = 0;
  std::uint32_t epoch = 0;
  Protection protection = Protection::kChecksum;
  std::string host = "0.0.0.0";
  std::uint16_t port = 0;
  std::uint64_t eager_bytes = 16 * 1024;
  std::uint64_t eager_credit_bytes = 4 * 1024 * 1024;
  double heartbeat_s = 1;
  double dead_s = 10;
  double connect_timeout_s = 30;
  double aging_s = 2;
  bool has_pacing = true;
  bool has_dscp = true;
  std::size_t log_frames = 0;
  std::string buckets;  // the file of an emulated network, in which the rank is a device
};

}  // namespace dora
