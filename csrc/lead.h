// Which thread runs the event loop: the I/O thread, or a caller who waits for a message anyway.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace dora {

// The right to run the event loop; exactly one thread has it, or for a moment nobody.
//
// A message that wakes the I/O thread, which then wakes the caller, costs two wake-ups; one that
// wakes the caller itself costs one (round trips of 4 KiB on loopback, two cores: 51 instead of 69
// us). So when nothing is under way, and somebody would have waited, the I/O thread opens the lead.
// A caller who waits takes it, and gives it back when others need the loop, else leaves it open for
// the next one: during a ping-pong the I/O thread only looks on, and it resumes the lead when callers
// have lost interest.
// Thread safety: all methods may be called from any thread; `open` and `standBy` are the I/O
// thread's, `leave` is the caller's who has taken the lead.
class Lead {
 public:
  // A caller asks for the lead. The I/O thread hears of it when it can not be had now.
  bool tryTake();
  // Ends what tryTake began. `is_needed`: the loop must go on at once.
  void leave(bool is_needed);
  // The loop must go on at once: the I/O thread takes the lead if nobody has it.
  void recall();

  // Has a caller asked in vain since the last `open`?
  bool isWanted() const { return is_wanted_; }
  // Whoever asks first has the lead now.
  void open();
  // After `open`: returns when the I/O thread has the lead again.
  void standBy();

 private:
  enum class Holder { kIoThread, kCaller, kNobody };

  void change(Holder holder);
  bool isBack() const { return holder_ == Holder::kIoThread; }

  std::atomic<bool> is_wanted_{false};
  std::mutex mutex_;  // for what follows
  std::condition_variable back_;
  Holder holder_ = Holder::kIoThread;
  std::uint64_t num_changes_ = 0;
  bool is_asleep_ = false;  // the I/O thread looks on no more
};

}  // namespace dora
