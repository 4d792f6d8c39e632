#include "send_queue.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace dora {
namespace {

void check(Priority priority) {
  if (priority.traffic_class >= kNumClasses) {
    throw std::invalid_argument("traffic class is " + std::to_string(priority.traffic_class) +
                                "; use 0 (first) to " + std::to_string(kNumClasses - 1));
  }
  if (std::isnan(priority.deadline)) {
    throw std::invalid_argument("deadline is NaN; use any comparable number, 0 for none");
  }
  if (priority.unit_bytes == 0 || priority.unit_bytes > kMaxUnitBytes) {
    throw std::invalid_argument("unit_bytes is " + std::to_string(priority.unit_bytes) +
                                "; use 1 to " + std::to_string(kMaxUnitBytes));
  }
}

}  // namespace

SendQueue::SendQueue(double aging_s, std::uint64_t credit_bytes)
    : aging_s_(aging_s), credit_bytes_(credit_bytes) {
  if (!(aging_s > 0)) {
    throw std::invalid_argument("aging_s is " + std::to_string(aging_s) +
                                "; use more than 0, or infinity for no ageing");
  }
  waiting_s_.fill(-std::numeric_limits<double>::infinity());
}

void SendQueue::post(std::uint64_t id, std::uint64_t num_bytes, Priority priority, double now_s,
                     bool is_ready) {
  check(priority);
  Message message{};
  message.key = {priority.traffic_class, priority.deadline, posts_};
  message.num_bytes = num_bytes;
  message.unit_bytes = priority.unit_bytes;
  message.posted_s = message.waiting_s = now_s;
  message.posted_class = priority.traffic_class;
  message.is_ready = is_ready;
  if (!messages_.emplace(id, message).second) {
    throw std::invalid_argument("message " + std::to_string(id) +
                                " is queued already; give each message an id of its own");
  }
  ++posts_;
  queued_bytes_ += num_bytes;
  enter(id, message);
}

bool SendQueue::setReady(std::uint64_t id) {
  auto entry = messages_.find(id);
  if (entry == messages_.end()) return false;
  entry->second.is_ready = true;
  enter(id, entry->second);
  return true;
}

bool SendQueue::reprioritise(std::uint64_t id, Priority priority) {
  check(priority);
  auto entry = messages_.find(id);
  if (entry == messages_.end()) return false;
  Message& message = entry->second;
  ready_.erase(message.key);
  message.key = {priority.traffic_class, priority.deadline, std::get<2>(message.key)};
  enter(id, message);
  return true;
}

bool SendQueue::cancel(std::uint64_t id) {
  auto entry = messages_.find(id);
  if (entry == messages_.end()) return false;
  erase(entry);
  return true;
}

std::optional<SendQueue::Chunk> SendQueue::next(double now_s, std::uint64_t chunk_bytes) {
  if (chunk_bytes == 0) throw std::invalid_argument("chunk_bytes is 0; use 1 or more");
  age(now_s);
  if (ready_.empty() || outstanding_bytes_ >= credit_bytes_) return std::nullopt;
  const std::uint64_t id = ready_.begin()->second;
  auto entry = messages_.find(id);
  Message& message = entry->second;
  noteService(id, message, now_s);
  const std::uint64_t whole = chunk_bytes - chunk_bytes % message.unit_bytes;
  const std::uint64_t num_bytes =
      std::min(std::max(whole, message.unit_bytes), message.num_bytes - message.offset);
  const Chunk chunk{id, message.offset, num_bytes, message.offset + num_bytes == message.num_bytes};
  message.offset += num_bytes;
  queued_bytes_ -= num_bytes;
  outstanding_bytes_ += num_bytes;
  stats_.bytes[message.posted_class] += num_bytes;
  if (chunk.is_last) erase(entry);
  return chunk;
}

std::optional<Priority> SendQueue::head(double now_s) {
  age(now_s);
  if (ready_.empty()) return std::nullopt;
  const Key& key = ready_.begin()->first;
  return Priority{std::get<0>(key), std::get<1>(key)};
}

void SendQueue::setCredit(std::uint64_t credit_bytes) { credit_bytes_ = credit_bytes; }

void SendQueue::acknowledge(std::uint64_t num_bytes) {
  outstanding_bytes_ -= std::min(num_bytes, outstanding_bytes_);
}

// One step per class and call: the clock restarts now, not when the step was due.
void SendQueue::age(double now_s) {
  for (std::uint8_t c = kActivation + 1; c < kNumClasses; ++c) {
    auto first = firstOf(c);
    if (first == ready_.end() || now_s - waiting_s_[c] < aging_s_) continue;
    const std::uint64_t id = first->second;
    ready_.erase(first);
    Message& message = messages_.at(id);
    --std::get<0>(message.key);
    message.waiting_s = waiting_s_[c] = now_s;
    enter(id, message);
  }
}

SendQueue::Ready::iterator SendQueue::firstOf(std::uint8_t traffic_class) {
  auto first = ready_.lower_bound({traffic_class, -std::numeric_limits<double>::infinity(), 0});
  const bool is_any = first != ready_.end() && std::get<0>(first->first) == traffic_class;
  return is_any ? first : ready_.end();
}

void SendQueue::enter(std::uint64_t id, const Message& message) {
  if (!message.is_ready) return;
  const std::uint8_t c = std::get<0>(message.key);
  if (firstOf(c) == ready_.end()) waiting_s_[c] = std::max(waiting_s_[c], message.waiting_s);
  ready_.emplace(message.key, id);
}

void SendQueue::erase(Messages::iterator entry) {
  const auto& [id, message] = *entry;
  ready_.erase(message.key);
  if (current_ == id) current_.reset();
  queued_bytes_ -= message.num_bytes - message.offset;
  messages_.erase(entry);
}

void SendQueue::noteService(std::uint64_t id, Message& message, double now_s) {
  if (current_ && *current_ != id) ++stats_.preemptions;
  current_ = id;
  waiting_s_[std::get<0>(message.key)] = now_s;
  if (message.is_started) return;
  message.is_started = true;
  ++stats_.messages[message.posted_class];
  stats_.queue_s[message.posted_class] += now_s - message.posted_s;
}

}  // namespace dora
