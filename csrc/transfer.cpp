#include "transfer.h"

namespace dora {

std::string Transfer::explain(const std::string& reason) const {
  std::string from = peer == kAnySource ? "any rank" : "rank " + std::to_string(peer);
  return "rank " + std::to_string(self) + (is_send ? ": send of " : ": receive of ") +
         std::to_string(num_bytes) + " bytes " + (is_send ? "to " : "from ") + from + " (tag " +
         std::to_string(key.tag) + "): " + reason;
}

std::string sizeMismatch(std::uint64_t sent, std::uint64_t expected) {
  return "the message has " + std::to_string(sent) + " bytes, the receive has room for " +
         std::to_string(expected) + ": give both the same shape and dtype";
}

namespace {

std::uint64_t slot(const MessageKey& key) {
  return (std::uint64_t{key.group} << 32) | static_cast<std::uint32_t>(key.tag);
}

}  // namespace

void PostCounter::count(MessageKey& key) {
  if (key.seq == kCounted) key.seq = next_[slot(key)]++;
}

bool PostCounter::isPast(const MessageKey& key) const {
  auto found = next_.find(slot(key));
  return key.tag >= 0 && found != next_.end() && key.seq < found->second;
}

MessageKey PostCounter::next(MessageKey key) const {
  if (key.seq != kCounted) return key;
  auto found = next_.find(slot(key));
  key.seq = found == next_.end() ? 0 : found->second;
  return key;
}

void Lanes::control(const FrameHeader& header, const std::string& payload) {
  if (lane[kUrgentLane]) {
    lane[kUrgentLane]->sendControl(header, payload);
  } else if (!is_dropped_) {
    early_.emplace_back(header, payload);
  }
}

void Lanes::attach(int number, std::unique_ptr<Connection> connection) {
  lane[static_cast<std::size_t>(number)] = std::move(connection);
  if (number != kUrgentLane) return;
  for (const auto& [header, payload] : early_) control(header, payload);
  early_.clear();
}

void Lanes::drop() {
  is_dropped_ = true;
  early_.clear();
  for (auto& connection : lane) connection.reset();
}

void Lanes::control(FrameType type, const MessageKey& key, std::uint64_t total,
                    std::uint8_t flags, const std::string& payload) {
  FrameHeader header;
  header.type = type;
  header.flags = flags;
  header.group = key.group;
  header.tag = key.tag;
  header.seq = key.seq;
  header.total = total;
  control(header, payload.substr(0, 512));
}

}  // namespace dora
