// What the tests of the collectives run on: a network in memory that delays and reorders messages
// and loses ranks, teams, and data of any type.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "collectives.h"

namespace dora {

// Messages of all ranks, matched by key; one thread delivers them after random delays.
//
// Some short sends finish at once. A cancelled message is remembered until its other side comes,
// and a cancelled receive's memory is written to as long as it may be.
class Network {
 public:
  explicit Network(std::uint32_t seed) : random_(seed), thread_([this] { run(); }) {}

  ~Network() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_closing_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }

  using Key = std::tuple<std::uint32_t, std::uint32_t, std::uint32_t, std::int32_t, std::uint64_t>;

  OperationPtr post(bool is_send, void* data, std::uint64_t num_bytes, const Key& key,
                    double timeout_s) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto operation = std::make_shared<Operation>(num_operations_++);
    if (lost_.count(std::get<0>(key)) || lost_.count(std::get<1>(key))) {
      operation->finish(Outcome::kPeerLost, "rank lost");
      return operation;
    }
    Message& message = messages_[key];
    if (message.is_cancelled) {
      messages_.erase(key);
      operation->finish(Outcome::kProtocol, "peer cancelled");
      return operation;
    }
    Side& side = message.sides[is_send];
    if (side.operation) throw std::logic_error("two messages of one key");
    side = {operation, static_cast<std::uint8_t*>(data), num_bytes, is_send};
    keys_[operation->id] = key;
    if (is_send && num_bytes <= 4096 && random_() % 2 == 0) {  // eager
      message.copy.assign(side.data, side.data + num_bytes);
      side.data = message.copy.data();
      operation->finish(Outcome::kDone);
    }
    if (message.sides[!is_send].operation) later(delay(), [this, key] { deliver(key); });
    later(std::min(timeout_s, 1e6),
          [this, operation] { abandon(operation, Outcome::kTimedOut, "timed out"); });
    return operation;
  }

  void cancel(const OperationPtr& operation) {
    std::lock_guard<std::mutex> lock(mutex_);
    abandon(operation, Outcome::kCancelled, "cancelled");
  }

  // Fails all operations with that rank, now and in future.
  void lose(std::uint32_t rank) {
    std::lock_guard<std::mutex> lock(mutex_);
    lost_.insert(rank);
    for (auto entry = messages_.begin(); entry != messages_.end();) {
      const bool is_hit = std::get<0>(entry->first) == rank || std::get<1>(entry->first) == rank;
      if (is_hit) {
        for (Side& side : entry->second.sides) end(side, Outcome::kPeerLost, "rank lost");
      }
      entry = is_hit ? messages_.erase(entry) : std::next(entry);
    }
  }

  std::size_t size() {
    std::lock_guard<std::mutex> lock(mutex_);
    return messages_.size();
  }

 private:
  using Clock = std::chrono::steady_clock;

  struct Side {
    OperationPtr operation;
    std::uint8_t* data = nullptr;
    std::uint64_t num_bytes = 0;
    bool is_send = false;
  };
  struct Message {
    Side sides[2];  // receive, send
    std::vector<std::uint8_t> copy;
    bool is_cancelled = false;  // by the side that is no longer there
  };

  double delay() { return static_cast<double>(random_() % 200) * 1e-6; }

  void later(double delay_s, std::function<void()> event) {
    const auto delay = std::chrono::nanoseconds(static_cast<std::int64_t>(delay_s * 1e9));
    events_.emplace(Clock::now() + delay, std::move(event));
    changed_.notify_all();
  }

  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!is_closing_) {
      if (events_.empty()) {
        changed_.wait(lock);
      } else if (const auto due = events_.begin()->first; due > Clock::now()) {
        changed_.wait_until(lock, due);
      } else {
        const auto event = std::move(events_.begin()->second);
        events_.erase(events_.begin());
        event();
      }
    }
  }

  void deliver(const Key& key) {
    const auto found = messages_.find(key);
    if (found == messages_.end() || found->second.is_cancelled) return;
    auto& [receive, send] = found->second.sides;
    const bool is_equal = receive.num_bytes == send.num_bytes;
    if (is_equal && send.num_bytes) std::memcpy(receive.data, send.data, send.num_bytes);
    const Outcome outcome = is_equal ? Outcome::kDone : Outcome::kProtocol;
    receive.operation->finish(outcome, is_equal ? "" : "sizes differ");
    send.operation->finish(outcome, is_equal ? "" : "sizes differ");
    messages_.erase(found);
  }

  // A while later; a receive's memory may be written to until then.
  void end(const Side& side, Outcome outcome, const std::string& error) {
    if (!side.operation || side.operation->isDone()) return;
    later(delay(), [side, outcome, error] {
      if (!side.is_send && side.num_bytes) std::memset(side.data, 0xaa, side.num_bytes);
      side.operation->finish(outcome, error);
    });
  }

  void abandon(const OperationPtr& operation, Outcome outcome, const std::string& error) {
    const auto found = messages_.find(keys_[operation->id]);
    if (operation->isDone() || found == messages_.end()) return;
    Message& message = found->second;
    const bool is_send = message.sides[1].operation == operation;
    if (message.sides[is_send].operation != operation) return;
    const Side own = message.sides[is_send], other = message.sides[!is_send];
    if (other.operation) {
      messages_.erase(found);
    } else {
      message = {};
      message.is_cancelled = true;
    }
    end(own, outcome, error);
    end(other, Outcome::kProtocol, "peer cancelled");
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::mt19937 random_;
  std::map<Key, Message> messages_;
  std::map<std::uint64_t, Key> keys_;
  std::multimap<Clock::time_point, std::function<void()>> events_;
  std::set<std::uint32_t> lost_;
  std::uint64_t num_operations_ = 0;
  bool is_closing_ = false;
  std::thread thread_;
};

class Endpoint : public Messenger {
 public:
  Endpoint(Network& network, std::uint32_t rank, std::uint32_t size)
      : network_(network), rank_(rank), size_(size) {}

  OperationPtr send(const void* data, std::uint64_t num_bytes, std::uint32_t dst, MessageKey key,
                    Priority priority, double timeout_s) override {
    if (priority.traffic_class != kUrgent || priority.deadline != 5) {
      throw std::logic_error("not the priority of the team");
    }
    if (dst >= size_) throw std::invalid_argument("no rank " + std::to_string(dst));
    return network_.post(true, const_cast<void*>(data), num_bytes,
                         {rank_, dst, key.group, key.tag, key.seq}, timeout_s);
  }
  OperationPtr receive(void* data, std::uint64_t num_bytes, std::int32_t src, MessageKey key,
                       double timeout_s) override {
    const auto source = static_cast<std::uint32_t>(src);
    if (source >= size_) throw std::invalid_argument("no rank " + std::to_string(src));
    return network_.post(false, data, num_bytes, {source, rank_, key.group, key.tag, key.seq},
                         timeout_s);
  }
  void cancel(const OperationPtr& operation) override { network_.cancel(operation); }

 private:
  Network& network_;
  const std::uint32_t rank_, size_;
};

struct World {
  explicit World(std::uint32_t size, std::uint32_t seed = 1) : network(seed) {
    for (std::uint32_t rank = 0; rank < size; ++rank) {
      ranks.push_back(std::make_unique<Collectives>(
          std::make_shared<Endpoint>(network, rank, size), rank));
    }
  }
  Network network;
  std::vector<std::unique_ptr<Collectives>> ranks;
};

// `size` of the seven ranks, not in their order; a group of its own; the priority that the
// endpoints expect.
inline Team teamOf(std::uint32_t size) {
  const std::vector<std::uint32_t> scrambled = {3, 0, 6, 2, 5, 1, 4};
  return {{scrambled.begin(), scrambled.begin() + size}, 10 + size, {kUrgent, 5}, 60};
}

constexpr std::uint32_t kSizes[] = {1, 2, 3, 4, 7};

using Bytes = std::vector<std::uint8_t>;

// Small whole numbers, exact in every type; from its 1, which memory holds in little-endian order.
inline void put(std::uint8_t* to, DataType type, int value) {
  const std::uint64_t ones[] = {0x3f800000, 0x3ff0000000000000, 0x3c00, 0x3f80, 1, 1, 1, 1, 1};
  std::memcpy(to, &ones[static_cast<int>(type)], sizeOf(type));
  scale(to, 1, type, value);
}

template <typename Value>
Bytes fill(std::size_t count, DataType type, Value value) {
  Bytes data(count * sizeOf(type));
  const std::size_t size = sizeOf(type);
  Bytes known(65 * size);
  for (int i = 0; i <= 64; ++i) put(known.data() + i * size, type, i);
  for (std::size_t i = 0; i < count; ++i) {
    std::memcpy(data.data() + i * size, known.data() + value(i) * size, size);
  }
  return data;
}

// Values whose sum depends on the order.
inline std::vector<float> noise(std::size_t count, std::size_t seed) {
  std::mt19937 random(static_cast<std::uint32_t>(seed));
  std::vector<float> data(count);
  for (auto& value : data) {
    const auto mantissa = static_cast<float>(random());
    value = std::ldexp(mantissa, static_cast<int>(random() % 20) - 40);
  }
  return data;
}

inline Bytes pattern(std::size_t count, std::size_t seed) {
  Bytes data(count);
  for (std::size_t i = 0; i < count; ++i) data[i] = static_cast<std::uint8_t>(i * 7 + seed * 31);
  return data;
}

}  // namespace dora
