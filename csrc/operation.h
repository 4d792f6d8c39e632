// A send, receive or collective under way, as its owner sees it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "send_queue.h"

namespace dora {

enum class Outcome : std::uint8_t {
  kPending = 0,
  kDone = 1,
  kTimedOut = 2,
  kCancelled = 3,
  kPeerLost = 4,
  kProtocol = 5,  // sizes differ, checksum wrong, peer cancelled
  kClosed = 6,    // the engine was shut down or reconfigured
};

class CompletionQueue;
class Operation;

// Makes operations go on; lets a thread that waits for one do that itself.
class Driver {
 public:
  virtual ~Driver() = default;
  // Somebody counts on an operation without waiting for it.
  virtual void attend() noexcept = 0;
  // Works until `operation` is finished or `timeout_s` has passed; may return earlier, also at once.
  virtual void drive(const Operation& operation, double timeout_s) noexcept = 0;
};

// Thread safety: all methods may be called from any thread; `finish` takes effect once.
class Operation {
 public:
  explicit Operation(std::uint64_t operation_id, std::weak_ptr<Driver> driver = {})
      : id(operation_id), driver_(std::move(driver)) {}
  virtual ~Operation() = default;

  const std::uint64_t id;

  Outcome outcome() const { return outcome_.load(std::memory_order_acquire); }
  bool isDone() const { return outcome() != Outcome::kPending; }
  std::string error() const;  // why it failed; empty while pending and when done

  // Blocks until it is finished or `timeout_s` has passed; returns isDone().
  bool wait(double timeout_s);

  void finish(Outcome outcome, const std::string& error = "");

  // Tells `queue` when finished, at once if it is already; at most one queue, one call.
  void notify(std::shared_ptr<CompletionQueue> queue);

  // Filled in by a receive from any source before it finishes.
  std::atomic<std::int32_t> source{-1};

 private:
  const std::weak_ptr<Driver> driver_;
  std::atomic<Outcome> outcome_{Outcome::kPending};
  mutable std::mutex mutex_;
  std::condition_variable finished_;
  std::string error_;
  std::shared_ptr<CompletionQueue> queue_;
};

using OperationPtr = std::shared_ptr<Operation>;

// Finished operations, for a thread that acts on them.
class CompletionQueue {
 public:
  void push(std::uint64_t id);
  // Blocks until something has finished, `timeout_s` has passed or `close` was called; returns
  // the ids of finished operations in order.
  std::vector<std::uint64_t> take(double timeout_s);
  void close();
  bool isClosed() const;

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::uint64_t> ids_;
  bool is_closed_ = false;
};

// `seq` kCounted: messages with the same group, peer and tag match in the order of posting.
constexpr std::uint64_t kCounted = std::numeric_limits<std::uint64_t>::max();
constexpr std::int32_t kAnySource = -1;

struct MessageKey {
  std::uint32_t group = 0;
  std::int32_t tag = 0;  // negative tags belong to the engine
  std::uint64_t seq = kCounted;
};

// Sends and receives bytes between ranks; the caller keeps the memory alive and, for a send,
// unchanged until the operation is finished. Never blocks.
class Messenger {
 public:
  virtual ~Messenger() = default;
  virtual OperationPtr send(const void* data, std::uint64_t num_bytes, std::uint32_t dst,
                            MessageKey key, Priority priority, double timeout_s) = 0;
  virtual OperationPtr receive(void* data, std::uint64_t num_bytes, std::int32_t src,
                               MessageKey key, double timeout_s) = 0;
  virtual void cancel(const OperationPtr& operation) = 0;
};

}  // namespace dora
