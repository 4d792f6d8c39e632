#include "operation.h"

#include <chrono>

namespace dora {

namespace {

// condition_variable overflows on waits of centuries; nobody waits longer than a day at once.
std::chrono::duration<double> bounded(double seconds) {
  return std::chrono::duration<double>(seconds < 0 ? 0 : seconds > 86400 ? 86400 : seconds);
}

}  // namespace

std::string Operation::error() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return error_;
}

bool Operation::wait(double timeout_s) {
  if (isDone() || !(timeout_s > 0)) return isDone();
  auto limit = std::chrono::steady_clock::now() + bounded(timeout_s);
  if (auto driver = driver_.lock()) driver->drive(*this, bounded(timeout_s).count());
  std::unique_lock<std::mutex> lock(mutex_);
  return finished_.wait_until(lock, limit, [this] { return isDone(); });
}

void Operation::finish(Outcome outcome, const std::string& error) {
  std::shared_ptr<CompletionQueue> queue;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (isDone()) return;
    error_ = error;
    queue = std::move(queue_);
    outcome_.store(outcome, std::memory_order_release);
  }
  finished_.notify_all();  // unlocked: who wakes up need not wait again
  if (queue) queue->push(id);
}

void Operation::notify(std::shared_ptr<CompletionQueue> queue) {
  bool is_over;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_over = isDone();
    if (!is_over) queue_ = std::move(queue);
  }
  if (is_over) return queue->push(id);
  if (auto driver = driver_.lock()) driver->attend();
}

void CompletionQueue::push(std::uint64_t id) {
  std::lock_guard<std::mutex> lock(mutex_);
  ids_.push_back(id);
  changed_.notify_one();
}

std::vector<std::uint64_t> CompletionQueue::take(double timeout_s) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, bounded(timeout_s), [this] { return !ids_.empty() || is_closed_; });
  std::vector<std::uint64_t> taken(ids_.begin(), ids_.end());
  ids_.clear();
  return taken;
}

void CompletionQueue::close() {
  std::lock_guard<std::mutex> lock(mutex_);
  is_closed_ = true;
  changed_.notify_all();
}

bool CompletionQueue::isClosed() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return is_closed_;
}

}  // namespace dora
