#include "ring_exchange.h"

#include <algorithm>
#include <exception>
#include <utility>

namespace dora {

Exchange::Exchange(Messages& messages, Team team, std::size_t index, std::uint64_t number,
                   std::string name, OperationPtr parent, Start start)
    : messages_(messages),
      team_(std::move(team)),
      index_(index),
      number_(number),
      name_(std::move(name)),
      parent_(std::move(parent)),
      start_(std::move(start)) {}

std::size_t Exchange::at(std::ptrdiff_t distance) const {
  const auto size = static_cast<std::ptrdiff_t>(team_.ranks.size());
  const std::ptrdiff_t place = (static_cast<std::ptrdiff_t>(index_) + distance) % size;
  return static_cast<std::size_t>(place < 0 ? place + size : place);
}

void Exchange::send(const void* data, std::uint64_t num_bytes, std::size_t to, Slot slot,
                    Then then) {
  await(
      [&](double timeout_s) {
        return messages_.messenger->send(data, num_bytes, team_.ranks[to], keyOf(slot),
                                         team_.priority, timeout_s);
      },
      std::move(then));
}

void Exchange::receive(void* data, std::uint64_t num_bytes, std::size_t from, Slot slot,
                       Then then) {
  await(
      [&](double timeout_s) {
        return messages_.messenger->receive(data, num_bytes,
                                            static_cast<std::int32_t>(team_.ranks[from]),
                                            keyOf(slot), timeout_s);
      },
      std::move(then));
}

void Exchange::start() {
  advance([this] { start_(*this); });
}

void Exchange::settle(const Messages::Child& child) {
  --num_pending_;
  if (child.operation->outcome() != Outcome::kDone) {
    fail(child.operation->outcome(), child.operation->error());
  }
  advance(child.then);
}

void Exchange::fail(Outcome outcome, const std::string& error) {
  if (hasFailed()) return;
  outcome_ = outcome;
  error_ = name_ + ": " + error;
  for (const auto& [id, child] : messages_.children) {
    if (child.exchange == this && !child.operation->isDone()) {
      messages_.messenger->cancel(child.operation);
    }
  }
}

// An exception here (no memory, a message that the messenger refuses) must not end the thread.
void Exchange::advance(const Then& step) {
  try {
    if (step) step();
    if (num_pending_ == 0 && !hasFailed() && at_end_) at_end_();
  } catch (const std::exception& error) {
    fail(Outcome::kProtocol, error.what());
  }
  if (num_pending_ == 0) parent_->finish(outcome_, error_);
}

template <typename Post>
void Exchange::await(Post post, Then then) {
  const double left_s = timeLeft();
  if (left_s <= 0) {
    fail(Outcome::kTimedOut, "not finished after " + std::to_string(team_.timeout_s) + " s");
  }
  OperationPtr child;
  try {
    child = post(std::max(left_s, 0.0));
  } catch (const std::exception& error) {
    child = std::make_shared<Operation>(kOwnIds | messages_.num_refused++);
    child->finish(Outcome::kProtocol, error.what());
  }
  ++num_pending_;
  messages_.children.emplace(child->id, Messages::Child{child, this, std::move(then)});
  if (hasFailed() && !child->isDone()) messages_.messenger->cancel(child);
  child->notify(messages_.finished);
}

MessageKey Exchange::keyOf(Slot slot) const {
  return {team_.group, -1 - static_cast<std::int32_t>(slot.slice), number_ << 16 | slot.step};
}

double Exchange::timeLeft() const {
  return team_.timeout_s - std::chrono::duration<double>(Clock::now() - begun_).count();
}

}  // namespace dora
