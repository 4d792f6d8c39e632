// Lends a shared medium to one sender at a time, by priority.
//
// One rank per medium runs it. A lend is open-ended: it costs messages only when another sender
// wants the medium more. std only; time is an argument.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "send_queue.h"

namespace dora {

// The wishes for one medium.
//
// The holder keeps the medium until it returns it; a wish that goes before the holder's (class,
// deadline; FIFO among equals) makes it revoked once. A wish that has waited `aging_s` goes up
// one class, never into kUrgent or above. A holder's wish does not age; after each `aging_s` of
// holding it counts as made anew: in the class it was made in and behind its equals, so that equals
// take turns and a wish that has aged gets a turn, not the medium for good.
//
// Thread safety: none.
class Arbiter {
 public:
  enum class Kind { kAllow, kRevoke };
  struct Order {
    Kind kind;
    std::uint32_t rank;
  };

  explicit Arbiter(double aging_s);

  // `rank` wants the medium with this priority, or holds it and its priority has changed; a wish
  // keeps its place and age. What is out of range (it comes from a peer) counts as the lowest.
  std::vector<Order> want(std::uint32_t rank, Priority priority, double now_s);

  // `rank` returns the medium or wants it no longer; also when its connection is lost. Harmless
  // for a rank that neither holds nor wants.
  std::vector<Order> giveBack(std::uint32_t rank, double now_s);

  // Re-examines ageing wishes; call it a few times per `aging_s`.
  std::vector<Order> tick(double now_s);

  std::optional<std::uint32_t> holder() const { return holder_; }

 private:
  struct Wish {
    Priority priority;        // as made
    std::uint8_t steps;       // classes it has moved up
    double since_s;           // when it was made, last moved up or was last lent the medium
    std::uint64_t order;
  };
  using Wishes = std::map<std::uint32_t, Wish>;

  void age(double now_s);
  static bool goesBefore(const Wish& a, const Wish& b);
  Wishes::iterator first();  // of the waiting ones; end() if none
  std::vector<Order> decide(double now_s);

  double aging_s_;
  std::uint64_t orders_ = 0;
  Wishes wishes_;  // waiting ranks, and the holder's own
  std::optional<std::uint32_t> holder_;
  bool is_revoked_ = false;
};

}  // namespace dora
