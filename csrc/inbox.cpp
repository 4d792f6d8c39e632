#include "inbox.h"

#include <algorithm>
#include <cstring>

namespace dora {

namespace {

constexpr std::size_t kMaxEnded = 1024;

}  // namespace

Inbox::Inbox(const EngineOptions& options, Lanes& lanes) : options_(options), lanes_(lanes) {}

void Inbox::post(const TransferPtr& transfer) {
  counter_.count(transfer->key);
  const MessageKey key = transfer->key;
  auto [message, is_new] = messages_.try_emplace(key);
  Message& m = message->second;
  m.transfer = transfer;
  ++num_posted_;
  bool is_large = transfer->num_bytes > options_.eager_bytes;
  if (is_new) {
    m.total = transfer->num_bytes;
    if (is_large) lanes_.control(FrameType::kGrant, key, m.total);
    return;
  }
  if (!m.failure.empty()) return fail(message, std::string(m.failure));
  if (m.total != transfer->num_bytes) {
    std::string reason = sizeMismatch(m.total, transfer->num_bytes);
    lanes_.control(FrameType::kCancel, key, 0, kFlagToSender, reason);
    return fail(message, reason);
  }
  if (is_large || m.is_requested) lanes_.control(FrameType::kGrant, key, m.total);
  charged_bytes_ -= m.charge;
  if (!is_large && m.charge > 0) credit(m.charge);
  m.charge = 0;
  // Chunks of a message come in order, so what is stored is its beginning.
  if (m.received > 0) std::memcpy(transfer->data, m.stored.data(), m.received);
  if (m.is_eager && m.received == m.total) complete(message);
}

// ------------------------------------------------------------ arriving data

bool Inbox::isStale(const MessageKey& key) const {
  if (counter_.isPast(key)) return true;
  return std::find(ended_.begin(), ended_.end(), key) != ended_.end();
}

// Makes room for a message that nobody has posted a receive for.
bool Inbox::begin(const FrameHeader& header) {
  std::uint64_t charge = eagerCharge(header.total);
  if (charge > options_.eager_credit_bytes - std::min(charged_bytes_, options_.eager_credit_bytes)) {
    throw ProtocolError("data: given " + std::to_string(header.total) +
                        " unexpected bytes, allowed " +
                        std::to_string(options_.eager_credit_bytes - charged_bytes_));
  }
  Message message;
  message.total = header.total;
  message.is_eager = true;
  message.charge = charge;
  message.stored.resize(header.total);
  charged_bytes_ += charge;
  messages_.emplace(keyOf(header), std::move(message));
  return true;
}

std::uint8_t* Inbox::onHeader(const FrameHeader& header) {
  auto message = messages_.find(keyOf(header));
  if (message == messages_.end()) {
    if (!(header.flags & kFlagEager) || isStale(keyOf(header))) return nullptr;
    begin(header);
    message = messages_.find(keyOf(header));
  }
  Message& m = message->second;
  if (!m.failure.empty()) return nullptr;
  if (header.total != m.total) {
    std::string reason = sizeMismatch(header.total, m.total);
    lanes_.control(FrameType::kCancel, keyOf(header), 0, kFlagToSender, reason);
    fail(message, reason);
    return nullptr;
  }
  m.is_eager = (header.flags & kFlagEager) != 0;
  if (m.transfer) return m.transfer->data + header.offset;
  // Only eager data may come before the receive: the sender has asked and was granted nothing yet.
  if (m.is_requested) throw ProtocolError("data: given before its grant, allowed: after it");
  return m.stored.data() + header.offset;
}

bool Inbox::onData(const FrameHeader& header, const std::uint8_t* payload, bool is_intact) {
  bytes_received_ += header.length;
  auto message = messages_.find(keyOf(header));
  // Only its arrival returns the credit of a small eager message: here unless it is stored, and
  // then when its receive is posted.
  bool is_last = header.offset + header.length == header.total;
  bool is_owed = is_last && (header.flags & kFlagEager) && header.total <= options_.eager_bytes;
  if (message == messages_.end()) {
    if (is_owed) credit(eagerCharge(header.total));
    return false;
  }
  Message& m = message->second;
  bool is_stored = !m.transfer || !m.stored.empty();
  if (is_owed && (!is_stored || !m.failure.empty() || !is_intact)) {
    credit(eagerCharge(header.total));
  }
  if (!m.failure.empty() || header.total != m.total) return false;
  if (!is_intact) {
    ++corrupt_frames_;
    std::string reason = "a chunk arrived with a wrong checksum";
    lanes_.control(FrameType::kCancel, keyOf(header), 0, kFlagToSender, reason);
    fail(message, reason);
    return false;
  }
  if (m.transfer && header.length > 0) {
    std::uint8_t* place = m.transfer->data + header.offset;
    // The receive was posted while this chunk was on its way into the store.
    if (payload != place) std::memcpy(place, payload, header.length);
  }
  bool is_first = m.received == 0 && !m.is_requested;
  m.received += header.length;
  if (m.received > m.total) throw ProtocolError("data: a message is longer than it said");
  if (m.transfer && m.received == m.total) {
    complete(message);
    return false;
  }
  return is_first && !m.transfer;
}

void Inbox::complete(Messages::iterator message) {
  TransferPtr transfer = std::move(message->second.transfer);
  messages_.erase(message);
  --num_posted_;
  transfer->finish(Outcome::kDone);
}

void Inbox::onBulkData(const FrameHeader& header) {
  bulk_bytes_ += header.length;
  if (!(header.flags & kFlagAckMe)) return;
  FrameHeader ack;
  ack.type = FrameType::kAck;
  ack.total = bulk_bytes_;
  lanes_.control(ack);
}

// ------------------------------------------------------------ the peer's questions

bool Inbox::onRequest(const FrameHeader& header) {
  MessageKey key = keyOf(header);
  if (isStale(key) && messages_.count(key) == 0) return false;
  auto [message, is_new] = messages_.try_emplace(key);
  Message& m = message->second;
  if (is_new) {
    if (messages_.size() - num_posted_ > kMaxRemembered) {
      throw ProtocolError("too many requests for unknown messages");
    }
    m.total = header.total;
    m.is_requested = true;
    return true;
  }
  if (!m.transfer || m.is_requested) return false;
  if (m.total != header.total) {
    std::string reason = sizeMismatch(header.total, m.total);
    lanes_.control(FrameType::kCancel, key, 0, kFlagToSender, reason);
    fail(message, reason);
    return false;
  }
  // A large receive was granted when it was posted.
  if (m.total <= options_.eager_bytes) lanes_.control(FrameType::kGrant, key, m.total);
  return false;
}

void Inbox::onCancel(const FrameHeader& header, const std::string& reason) {
  MessageKey key = keyOf(header);
  auto message = messages_.find(key);
  bool is_known = message != messages_.end();
  // A part of it has left early: its credit comes back with the one grant of every large message.
  bool was_granted = is_known ? message->second.transfer != nullptr : isStale(key);
  if ((header.flags & kFlagEager) && !was_granted) {
    lanes_.control(FrameType::kGrant, key, header.total);
  }
  if (!is_known) {
    if (isStale(key)) return;
    if (messages_.size() - num_posted_ > kMaxRemembered) {
      throw ProtocolError("too many cancelled unknown messages");
    }
    message = messages_.try_emplace(key).first;
  }
  fail(message, "the peer has cancelled it: " + reason);
}

// ------------------------------------------------------------ ending early

// Ends a message here: its receive fails now, or when it is posted.
void Inbox::fail(Messages::iterator message, const std::string& reason) {
  const MessageKey key = message->first;
  Message& m = message->second;
  detach(key);
  charged_bytes_ -= m.charge;
  // What arrived whole is owed; of a part, the sender has taken its credit back by itself.
  bool is_whole = m.is_eager && m.received == m.total;
  if (m.charge > 0 && is_whole && m.total <= options_.eager_bytes) credit(m.charge);
  m.charge = 0;
  m.stored = {};
  m.failure = reason;
  if (!m.transfer) return;
  TransferPtr transfer = std::move(m.transfer);
  messages_.erase(message);
  forget(key);
  --num_posted_;
  transfer->fail(Outcome::kProtocol, reason);
}

void Inbox::cancel(Transfer& transfer, Outcome outcome, const std::string& reason) {
  auto message = messages_.find(transfer.key);
  if (message == messages_.end() || message->second.transfer.get() != &transfer) return;
  detach(transfer.key);
  lanes_.control(FrameType::kCancel, transfer.key, 0, kFlagToSender, reason);
  messages_.erase(message);
  forget(transfer.key);
  --num_posted_;
  transfer.fail(outcome, reason);
}

void Inbox::failAll(Outcome outcome, const std::string& reason) {
  for (auto& connection : lanes_.lane) {
    if (connection) connection->detachTarget();
  }
  Messages messages;
  messages.swap(messages_);
  charged_bytes_ = 0;
  num_posted_ = 0;
  for (auto& [key, message] : messages) {
    if (message.transfer) {
      message.transfer->fail(outcome, reason);
    } else if (message.is_eager && message.received == message.total && message.failure.empty()) {
      // The peer's send was done when this had left it, so its receive may still come.
      message.charge = 0;
      messages_.emplace(key, std::move(message));
    }
  }
}

bool Inbox::hasWhole(const MessageKey& key) const {
  return messages_.count(counter_.next(key)) > 0;
}

// Remembers that late data of an ended message is to be dropped; counted ones need no memory.
void Inbox::forget(const MessageKey& key) {
  if (counter_.isPast(key)) return;
  ended_.push_back(key);
  if (ended_.size() > kMaxEnded) ended_.pop_front();
}

void Inbox::detach(const MessageKey& key) {
  for (auto& connection : lanes_.lane) {
    if (connection && connection->receiving() && keyOf(*connection->receiving()) == key) {
      connection->detachTarget();
    }
  }
}

void Inbox::credit(std::uint64_t num_bytes) {
  credit_bytes_ += num_bytes;
  if (credit_bytes_ < options_.eager_credit_bytes / 8) return;
  FrameHeader header;
  header.type = FrameType::kCredit;
  header.total = credit_bytes_;
  credit_bytes_ = 0;
  lanes_.control(header);
}

bool Inbox::hasNext(std::uint32_t group, std::int32_t tag) const {
  for (const auto& [key, message] : messages_) {
    if (key.group == group && key.tag == tag && !message.transfer && counter_.isNext(key)) {
      return true;
    }
  }
  return false;
}

}  // namespace dora
