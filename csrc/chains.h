// Enumerates pipelines over groups of devices, from the last block to the first, keeping those whose
// lower bound is best: a beam search that is exhaustive while the beam is wide enough. std only.
//
// For an order of groups, V is the least time in which the stages from one on can run their blocks.
// With n micro-batches on a replica that takes f + b = t for each, a hop c there and back, and D of
// one micro-batch through what follows:
//
//   V = max( n t,  n f + b + D,  f + n b + D,  f' + b' + c + max(V', D' + (n' - 1) w) )
//
// where w is how long a link is busy with one message, and f' and b' are of the fastest replicas. No schedule is faster, whatever its window.
// What all pipelines share is added: a medium is busy with all bytes that cross it, and blocks that
// are not placed yet take their share of the devices that are left. Compare PipeDream (SOSP 2019)
// and Asteroid (MobiCom 2024), whose recurrences keep the bottleneck only and know no shared medium.
#pragma once

#include <cstdint>
#include <vector>

namespace dora::sim {

// Arrays over blocks are prefix sums `[device][block]`, or `[first][end]`; over pairs `[src][dst]`.
struct ChainProblem {
  int num_blocks = 0;
  int num_devices = 0;
  int num_microbatches = 1;
  bool is_training = true;
  std::vector<double> forward_s, backward_s;            // prefix sums
  std::vector<double> state_bytes, gradient_bytes;      // [first][end]
  std::vector<double> activation_bytes, buffer_bytes;   // [first][end]
  std::vector<double> boundary_bytes;                   // into block k; 0 is the model's input
  std::vector<double> memory_bytes, idle_w, extra_w;    // per device; extra over idling
  std::vector<double> tx_j_per_byte, rx_j_per_byte;     // per device
  std::vector<double> s_per_byte, latency_s;            // per pair; infinite without a link
  std::vector<std::vector<double>> medium_s_per_byte;   // per shared medium and pair
  double hops = 1;                                      // messages per micro-batch and boundary
  int source = -1;
  std::vector<std::vector<int>> groups;                 // that may become a stage
  std::vector<int> twins;                               // per device, the class of its equals
  bool by_energy = false;
  double cutoff_s = 0, cutoff_j = 0;  // what a bound must stay below
  std::size_t width = 1000;           // pipelines kept per block
  std::size_t per_state = 1000;       // of those with the same devices and first group
};

struct Chain {
  double bound_s = 0, bound_j = 0;
  std::vector<std::int32_t> groups;  // first stage first
  std::vector<std::int32_t> ends;    // block after the last one of each stage
};

struct Chains {
  std::vector<Chain> found;  // best bound first
  double dropped_bound;      // least one that `width` or `per_state` cut off; infinite if none
};

Chains enumerateChains(const ChainProblem& problem);

// How many of `num_microbatches` each replica gets so that the last ends earliest.
std::vector<int> shareMicrobatches(const std::vector<double>& times_s, int num_microbatches);

}  // namespace dora::sim
