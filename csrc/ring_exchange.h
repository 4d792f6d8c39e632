// The messages of one collective under way: posts them, continues when they are finished, and
// ends all of them when one fails.
//
// Used by the one thread that takes finished messages from the queue; none of it blocks.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>

#include "collectives.h"

namespace dora {

class Exchange;

// The messages under way of all collectives of a rank, and the queue in which they come back.
struct Messages {
  struct Child {
    OperationPtr operation;
    Exchange* exchange;
    std::function<void()> then;
  };
  std::shared_ptr<Messenger> messenger;
  std::shared_ptr<CompletionQueue> finished;
  std::unordered_map<std::uint64_t, Child> children;  // by the operation's id
  std::uint64_t num_refused = 0;
};

// Operations that no messenger has made: their ids never equal a message's.
constexpr std::uint64_t kOwnIds = std::uint64_t{1} << 63;

// One collective under way: its messages, and its outcome.
//
// It is over when none of its messages is under way any more, so that nobody touches its memory
// afterwards. A failed exchange still goes through all its steps but cancels each message as soon
// as it is posted: every other member learns of the failure at its next message with this one,
// and nobody is left with a cancelled message that is never asked for.
class Exchange {
 public:
  using Then = std::function<void()>;
  using Start = std::function<void(Exchange&)>;

  // Tells the messages of one pair of members apart.
  struct Slot {
    std::uint32_t slice;
    std::uint32_t step;  // below 2^16
  };

  // `index` is the own place in the team, `number` that of the collective in its group.
  Exchange(Messages& messages, Team team, std::size_t index, std::uint64_t number,
           std::string name, OperationPtr parent, Start start);

  std::size_t size() const { return team_.ranks.size(); }
  std::size_t index() const { return index_; }
  // The member, and the segment, `distance` places after this one.
  std::size_t at(std::ptrdiff_t distance) const;

  // Starts a message to or from a member of the team; `then` runs when it is finished, well or
  // not.
  void send(const void* data, std::uint64_t num_bytes, std::size_t to, Slot slot, Then then = {});
  void receive(void* data, std::uint64_t num_bytes, std::size_t from, Slot slot, Then then = {});

  // The last thing to do when all messages have arrived.
  void atEnd(Then then) { at_end_ = std::move(then); }

  bool hasFailed() const { return outcome_ != Outcome::kDone; }

  // For the thread that runs it.
  void start();
  void settle(const Messages::Child& child);
  void fail(Outcome outcome, const std::string& error);
  bool isOver() const { return num_pending_ == 0; }  // once started
  std::uint64_t id() const { return parent_->id; }

 private:
  using Clock = std::chrono::steady_clock;

  void advance(const Then& step);
  template <typename Post>
  void await(Post post, Then then);
  MessageKey keyOf(Slot slot) const;
  double timeLeft() const;

  Messages& messages_;
  const Team team_;
  const std::size_t index_;
  const std::uint64_t number_;
  const std::string name_;
  const OperationPtr parent_;
  const Start start_;
  const Clock::time_point begun_ = Clock::now();
  std::size_t num_pending_ = 0;
  Then at_end_;
  Outcome outcome_ = Outcome::kDone;
  std::string error_;
};

}  // namespace dora
