// Plays what every rank does, in its order, against a fluid network: a discrete-event simulation.
// std only; deterministic.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "fluid.h"

namespace dora::sim {

constexpr std::int32_t kNone = -1;

// One thing that a rank does. It walks its list in order; only kCompute takes time or waits.
struct Op {
  enum Kind : std::uint8_t { kCompute, kSend, kReceive };
  Kind kind = kCompute;
  std::int32_t transfer = kNone;  // sent, received or, by kCompute, waited for
  double duration_s = 0;          // at speed 1
  double not_before_s = 0;
};

// A message. It moves once it is sent and, if `needs_receive`, a receive is posted.
struct Transfer {
  std::shared_ptr<const Path> path;
  std::int32_t src = 0, dst = 0;
  double num_bytes = 0;
  double latency_s = 0;  // from the last byte sent to its arrival
  double priority = 0;   // larger goes first
  double pace_bytes_per_s = std::numeric_limits<double>::infinity();
  double not_before_s = 0;
  bool needs_send = true;  // false: it is there from `not_before_s` on, as a camera's frames are
  bool needs_receive = true;
  bool is_reduction = false;  // a round of an all-reduce
};

// From `at_s` on, a medium's rate or a rank's speed is `factor` times what it was given as.
struct Change {
  double at_s = 0;
  bool is_medium = false;
  std::uint32_t index = 0;
  double factor = 1;
};

// What a rank that has waited is ahead: it computes at `sprint` times its speed until that is used
// up, and gets it back by waiting as long. So does a share of a processor that comes in periods.
struct Rest {
  double saved_s = 0;  // of work at its speed
  double sprint = 1;
};

struct Program {
  std::shared_ptr<const std::vector<FluidMedium>> media;
  std::vector<std::vector<Op>> ranks;
  std::vector<Rest> rests;  // per rank; empty: none is ever ahead
  std::vector<Transfer> transfers;
  std::vector<Change> changes;  // by ascending time
  Discipline discipline = Discipline::kPriority;
  double start_s = 0;
};

struct Interval {
  double start_s = 0;
  double end_s = 0;
};

struct Played {
  double end_s = 0;            // of the last compute or arrival; infinite if something never ends
  std::int32_t stuck = kNone;  // a rank that never ended, if any: one that computes, or the first
  std::vector<double> busy_s;  // per rank, computing
  std::vector<double> sent_bytes, received_bytes;  // per rank
  std::vector<double> medium_busy_s;               // per medium, carrying something
  std::vector<std::vector<Interval>> ops;          // per rank and op; empty for sends and receives
  std::vector<Interval> transfers;                 // only media holding it back, to arrival
};

// Plays a program to its end, in O((ops + transfers) (log ranks + flows at once)) by priority; fair
// sharing is quadratic in the flows at once.
Played play(const Program& program);

// Returns, per transfer, the longest path in seconds from its arrival to the end of the program, if
// no transfer ever waited for another. On one shared medium with preemption the order by largest
// tail is optimal: Jackson's rule, see Carlier, "The one-machine sequencing problem", EJOR 1982.
std::vector<double> tails(const Program& program);

// Returns the tails, but all rounds of reductions behind everything else: the engine sends gradients
// in a class below activations.
std::vector<double> priorities(const Program& program);

}  // namespace dora::sim
