// Collective operations as small state machines over a Messenger.
//
// Large tensors go round a ring in slices, so that one slice is reduced while another travels;
// small ones go directly to everybody. Each segment is reduced in one fixed order and then copied,
// so that all ranks get the same bits, in every run.
#pragma once

#include <memory>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "operation.h"
#include "reduce.h"

namespace dora {

// Who takes part, and how urgent it is.
struct Team {
  std::vector<std::uint32_t> ranks;  // distinct; the same order on all of them
  std::uint32_t group = 0;           // calls of one group are matched in the order they are made
  Priority priority{kGradient, 0};
  double timeout_s = 60;             // of the whole collective
};

// Runs collectives of one rank; any number may be under way.
//
// Thread safety: all methods may be called from any thread and return at once. The work is done by
// one thread of its own, so the I/O thread never computes.
class Collectives {
 public:
  Collectives(std::shared_ptr<Messenger> messenger, std::uint32_t rank);
  ~Collectives();  // fails what is under way with kClosed and joins the thread

  // Reduces `count` elements over the team, in place. With `shares` (one per team member), the
  // result is the sum of share * data: an average by share.
  OperationPtr allReduce(void* data, std::size_t count, DataType type, ReduceOp op,
                         const std::vector<double>& shares, const Team& team);

  // Member i of the team gets segment i (of `count` elements) of the reduction; `input` holds
  // team-size * count elements, `output` count.
  OperationPtr reduceScatter(const void* input, void* output, std::size_t count, DataType type,
                             ReduceOp op, const Team& team);

  // `output` gets everybody's `num_bytes`, in team order.
  OperationPtr allGather(const void* input, void* output, std::uint64_t num_bytes,
                         const Team& team);

  // Copies the root's bytes to everybody; `root` is a rank of the team.
  OperationPtr broadcast(void* data, std::uint64_t num_bytes, std::uint32_t root,
                         const Team& team);

  OperationPtr barrier(const Team& team);

  // Fails a collective of this rank with kCancelled, and its messages.
  void cancel(const OperationPtr& operation);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace dora
