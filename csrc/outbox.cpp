#include "outbox.h"

#include <algorithm>
#include <cmath>

namespace dora {

namespace {

constexpr std::uint64_t kNoLimit = std::uint64_t{1} << 62;

// Messages of the urgent classes up to this size leave on the lane of their own.
constexpr std::uint64_t kUrgentBytes = 64 * 1024;

// Before the rate is known: little enough for a slow link.
constexpr std::size_t kFirstUnsentLimit = 64 * 1024;

// Above these rates a full socket costs less time than waking up often to refill it.
constexpr double kFastBytesPerS = 50e6;
constexpr double kLocalBytesPerS = 250e6;
constexpr std::size_t kLocalUnsentLimit = 2 * 1024 * 1024;

}  // namespace

Outbox::Outbox(const EngineOptions& options, Lanes& lanes)
    : options_(options),
      lanes_(lanes),
      queues_{SendQueue(options.aging_s, kNoLimit),
              SendQueue(options.aging_s, AckWindow::kMinCreditBytes)} {}

void Outbox::post(const TransferPtr& transfer, double now_s) {
  counter_.count(transfer->key);
  const MessageKey& key = transfer->key;
  if (auto refused = refusals_.find(key); refused != refusals_.end()) {
    transfer->fail(Outcome::kProtocol, refused->second);
    refusals_.erase(refused);
    return;
  }
  std::uint64_t size = transfer->num_bytes;
  bool is_granted = false;
  if (auto grant = grants_.find(key); grant != grants_.end()) {
    std::uint64_t expected = grant->second;
    grants_.erase(grant);
    if (expected != size) {
      lanes_.control(FrameType::kCancel, key, 0, 0, sizeMismatch(size, expected));
      transfer->fail(Outcome::kProtocol, sizeMismatch(size, expected));
      return;
    }
    is_granted = true;
  }
  bool is_eager = !is_granted && charged_bytes_ + eagerCharge(size) <= options_.eager_credit_bytes;
  if (is_eager) {
    charged_bytes_ += eagerCharge(size);
    if (size > options_.eager_bytes) eager_[key] = eagerCharge(size);
  } else if (!is_granted) {
    lanes_.control(FrameType::kRequest, key, size);
  }
  bool is_urgent = transfer->priority.traffic_class <= kUrgent && size <= kUrgentBytes;
  int lane = is_urgent ? Lanes::kUrgentLane : Lanes::kBulkLane;
  queues_[static_cast<std::size_t>(lane)].post(transfer->id, size, transfer->priority, now_s,
                                               is_granted || is_eager);
  ids_[key] = transfer->id;
  sends_.emplace(transfer->id, Send{transfer, lane, is_eager});
}

void Outbox::reprioritise(Transfer& transfer, Priority priority) {
  auto send = sends_.find(transfer.id);
  if (send == sends_.end()) return;
  transfer.priority = priority;
  queues_[static_cast<std::size_t>(send->second.lane)].reprioritise(transfer.id, priority);
}

// ------------------------------------------------------------ leaving

void Outbox::fill(Connection& connection, int lane, double now_s) {
  SendQueue& queue = queues_[static_cast<std::size_t>(lane)];
  auto chunk = queue.next(now_s, lane == Lanes::kBulkLane ? chunkBytes() : kUrgentBytes);
  if (!chunk) return;
  Send& send = sends_.at(chunk->id);
  send.is_started = true;
  const Transfer& transfer = *send.transfer;
  FrameHeader header;
  header.type = FrameType::kData;
  header.traffic_class = transfer.priority.traffic_class;
  header.flags = send.is_eager ? kFlagEager : 0;
  header.group = transfer.key.group;
  header.tag = transfer.key.tag;
  header.seq = transfer.key.seq;
  header.offset = chunk->offset;
  header.total = transfer.num_bytes;
  header.length = static_cast<std::uint32_t>(chunk->num_bytes);
  last_chunk_of_[static_cast<std::size_t>(lane)] = chunk->is_last ? chunk->id : 0;
  if (lane == Lanes::kBulkLane) {
    bytes_sent_ += chunk->num_bytes;
    bool is_asking = window_.onChunk(chunk->num_bytes, chunkBytes(), queue.size() == 0);
    // On emulated media one chunk is under way at a time; without an acknowledgement of each, the
    // estimator would see pauses between them.
    if (is_asking || !options_.buckets.empty()) {
      header.flags |= kFlagAckMe;
      estimator_.onSent(bytes_sent_, now_s);
    }
    if (queue.size() == 0) estimator_.onIdle();
  }
  if (options_.has_dscp && lane == Lanes::kBulkLane && header.traffic_class != marked_class_) {
    marked_class_ = header.traffic_class;
    connection.socket().setTrafficClass(marked_class_);
  }
  connection.startData(header, transfer.data + chunk->offset);
}

void Outbox::onDataSent(int lane) {
  std::uint64_t& last = last_chunk_of_[static_cast<std::size_t>(lane)];
  auto send = sends_.find(last);
  last = 0;
  if (send != sends_.end()) finish(send);
}

void Outbox::finish(std::unordered_map<std::uint64_t, Send>::iterator send) {
  TransferPtr transfer = std::move(send->second.transfer);
  ids_.erase(transfer->key);
  sends_.erase(send);
  transfer->finish(Outcome::kDone);
}

// ------------------------------------------------------------ ending early

// Gives back the eager credit of a message that the peer will never see whole.
void Outbox::release(const Send& send) {
  if (!send.is_eager) return;
  const MessageKey& key = send.transfer->key;
  bool is_small = send.transfer->num_bytes <= options_.eager_bytes;
  if (is_small || eager_.erase(key) > 0) {
    charged_bytes_ -= std::min(charged_bytes_, eagerCharge(send.transfer->num_bytes));
  }
}

// Takes a message off the queue and frees its memory; what is on the way goes on from a copy.
void Outbox::drop(const Send& send) {
  queues_[static_cast<std::size_t>(send.lane)].cancel(send.transfer->id);
  Connection* connection = lanes_.lane[static_cast<std::size_t>(send.lane)].get();
  if (connection && connection->sending() &&
      keyOf(*connection->sending()) == send.transfer->key) {
    connection->detachData();
  }
  ids_.erase(send.transfer->key);
}

void Outbox::cancel(Transfer& transfer, Outcome outcome, const std::string& reason) {
  auto found = sends_.find(transfer.id);
  if (found == sends_.end()) return;
  Send& send = found->second;
  if (!isLeaving(send)) {
    // The peer may have charged what has left: its credit comes back with the peer's answer, since
    // this frame and the next data go different ways.
    bool is_charged = send.is_eager && send.is_started;
    if (is_charged) send.is_eager = false;
    lanes_.control(FrameType::kCancel, transfer.key, transfer.num_bytes,
                   is_charged ? kFlagEager : 0, reason);
  }
  end(found, outcome, reason);
}

// Its last chunk is on the way: the peer will get it whole.
bool Outbox::isLeaving(const Send& send) const {
  return last_chunk_of_[static_cast<std::size_t>(send.lane)] == send.transfer->id;
}

void Outbox::end(std::unordered_map<std::uint64_t, Send>::iterator found, Outcome outcome,
                 const std::string& reason) {
  bool is_leaving = isLeaving(found->second);
  Send send = std::move(found->second);
  sends_.erase(found);
  drop(send);
  if (!is_leaving) release(send);
  send.transfer->fail(outcome, reason);
}

void Outbox::failAll(Outcome outcome, const std::string& reason) {
  auto sends = std::move(sends_);
  sends_.clear();
  for (auto& [id, send] : sends) {
    drop(send);
    send.transfer->fail(outcome, reason);
  }
}

// ------------------------------------------------------------ the peer's answers

void Outbox::onGrant(const FrameHeader& header) {
  MessageKey key = keyOf(header);
  if (auto early = eager_.find(key); early != eager_.end()) {
    charged_bytes_ -= std::min(charged_bytes_, early->second);
    eager_.erase(early);
    return;
  }
  auto id = ids_.find(key);
  if (id == ids_.end()) {
    if (counter_.isPast(key)) return;
    if (grants_.size() >= kMaxRemembered) throw ProtocolError("too many grants of unknown messages");
    grants_[key] = header.total;
    return;
  }
  Send& send = sends_.at(id->second);
  if (header.total != send.transfer->num_bytes) {
    TransferPtr transfer = send.transfer;
    cancel(*transfer, Outcome::kProtocol, sizeMismatch(transfer->num_bytes, header.total));
    return;
  }
  queues_[static_cast<std::size_t>(send.lane)].setReady(id->second);
}

void Outbox::onCredit(const FrameHeader& header) {
  charged_bytes_ -= std::min(charged_bytes_, header.total);
}

void Outbox::onAck(const FrameHeader& header, double now_s) {
  if (header.total < acked_bytes_ || header.total > bytes_sent_) {
    throw ProtocolError("ack: given " + std::to_string(header.total) + " bytes, allowed " +
                        std::to_string(acked_bytes_) + " to " + std::to_string(bytes_sent_));
  }
  bulk().acknowledge(header.total - acked_bytes_);
  acked_bytes_ = header.total;
  estimator_.onAck(acked_bytes_, now_s);
  adapt(now_s);
}

void Outbox::onCancel(const FrameHeader& header, const std::string& reason) {
  MessageKey key = keyOf(header);
  auto id = ids_.find(key);
  if (id == ids_.end()) {
    if (auto early = eager_.find(key); early != eager_.end()) {
      charged_bytes_ -= std::min(charged_bytes_, early->second);
      eager_.erase(early);
    } else if (!counter_.isPast(key)) {
      grants_.erase(key);
      if (refusals_.size() < kMaxRemembered) refusals_[key] = reason;
    }
    return;
  }
  auto found = sends_.find(id->second);
  end(found, Outcome::kProtocol, reason);
}

// ------------------------------------------------------------ fitting the link

std::optional<double> Outbox::rateBytesPerS() const {
  if (known_rate_ > 0) return known_rate_;
  return estimator_.rateBytesPerS();
}

std::uint64_t Outbox::chunkBytes() const {
  if (known_rate_ <= 0) return estimator_.chunkBytes();
  auto wanted = static_cast<std::uint64_t>(known_rate_ * 2e-3) / 4096 * 4096;
  return std::clamp(wanted, kMinChunkBytes, kMaxChunkBytes);
}

std::size_t Outbox::unsentLimit(double rate_bytes_per_s) const {
  if (rate_bytes_per_s <= 0) return kFirstUnsentLimit;
  if (rate_bytes_per_s >= kLocalBytesPerS) return kLocalUnsentLimit;
  if (rate_bytes_per_s >= kFastBytesPerS) return chunkBytes();
  return std::max(kMinChunkBytes, chunkBytes() / 2);
}

void Outbox::adapt(double now_s) {
  Connection* connection = lanes_.lane[Lanes::kBulkLane].get();
  if (!connection) return;
  double rate = rateBytesPerS().value_or(0);
  double rtt_s = estimator_.minRttS().value_or(1e-3);
  auto in_flight = static_cast<std::uint64_t>(rate * (rtt_s + 4e-3));
  bulk().setCredit(window_.fit(chunkBytes(), in_flight));
  if (auto limit = unsentLimit(rate); limit != applied_limit_) {
    connection->socket().setUnsentLimit(applied_limit_ = limit);
  }
  // Loopback has segments of 64 KiB and no queue to keep short; paced, it moves in jerks.
  if (segment_bytes_ == 0) segment_bytes_ = connection->socket().segmentBytes();
  bool is_loopback = segment_bytes_ > kMinChunkBytes;
  if (!options_.has_pacing || (is_loopback && known_rate_ <= 0)) return;
  if (applied_pace_ > 0) estimator_.onQueueing(connection->socket().queueingS(), now_s);
  double pace = known_rate_ > 0 ? 0.99 * known_rate_ : estimator_.paceBytesPerS(now_s);
  if (std::abs(pace - applied_pace_) > 0.002 * applied_pace_) {
    connection->socket().setPace(applied_pace_ = pace);
  }
}

}  // namespace dora
