#include "lead.h"

#include <chrono>

namespace dora {

namespace {

// How often the I/O thread looks on. The loop rests for twice that at most; callers who come back
// within it, as in round trips of a fast network, need no other thread.
constexpr std::chrono::microseconds kLook{200};

}  // namespace

bool Lead::tryTake() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (holder_ == Holder::kIoThread) is_wanted_ = true;
  if (holder_ != Holder::kNobody) return false;
  change(Holder::kCaller);
  return true;
}

// A sleeping I/O thread has to be woken in any case: then it resumes the lead at once.
void Lead::leave(bool is_needed) {
  std::lock_guard<std::mutex> lock(mutex_);
  change(is_needed || is_asleep_ ? Holder::kIoThread : Holder::kNobody);
}

void Lead::recall() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (holder_ == Holder::kNobody) change(Holder::kIoThread);
}

void Lead::open() {
  std::lock_guard<std::mutex> lock(mutex_);
  is_wanted_ = false;
  change(Holder::kNobody);
}

void Lead::standBy() {
  std::unique_lock<std::mutex> lock(mutex_);
  auto is_back = [this] { return isBack(); };
  for (;;) {
    std::uint64_t seen = num_changes_;
    if (back_.wait_for(lock, kLook, is_back)) return;
    if (num_changes_ != seen) continue;  // callers are at it
    if (holder_ == Holder::kNobody) return change(Holder::kIoThread);
    is_asleep_ = true;  // a caller waits for longer
    back_.wait(lock, is_back);
    is_asleep_ = false;
    return;
  }
}

void Lead::change(Holder holder) {
  holder_ = holder;
  ++num_changes_;
  if (isBack()) back_.notify_one();
}

}  // namespace dora
