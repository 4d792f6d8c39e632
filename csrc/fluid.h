// Rates of flows that share media: the model of a contended network. std only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace dora::sim {

// Something that carries bytes for all flows that cross it, such as a Wi-Fi channel.
struct FluidMedium {
  double rate_bytes_per_s = 0;
  std::vector<double> efficiency = {1.0};  // in total, with 1, 2, ... flows; the last one extends

  double capacity(std::size_t num_flows) const;
};

// A flow that an access point sends again crosses its channel twice.
struct Crossing {
  std::uint32_t medium;
  std::uint32_t times;
};
using Path = std::vector<Crossing>;

struct Flow {
  const Path* path = nullptr;
  double priority = 0;  // larger goes first; equal ones in the order given
  double weight = 1;    // of its share among equals, under kFair
  double limit_bytes_per_s = std::numeric_limits<double>::infinity();
  double rate_bytes_per_s = 0;  // the result
};

enum class Discipline {
  kFair,      // max-min fair: what TCP flows and Wi-Fi stations do by themselves
  kPriority,  // the first takes what it can, the next what is left: what the arbiters enforce
};

// What flows put on a medium while their rates are found.
struct Load {
  double used = 0;
  double weight = 0;  // of the flows whose rate is still open
  std::size_t num_flows = 0;
};

// Sets the rate of every flow; `flows` are sorted by descending priority under kPriority.
void shareMedia(const std::vector<FluidMedium>& media, Discipline discipline,
                const std::vector<Flow*>& flows);

// The same with `loads`, one per medium, to work on: only those that flows cross are touched, so
// that a few flows among thousands of media cost no more than among a few.
void shareMedia(const std::vector<FluidMedium>& media, Discipline discipline,
                const std::vector<Flow*>& flows, std::vector<Load>& loads);

}  // namespace dora::sim
