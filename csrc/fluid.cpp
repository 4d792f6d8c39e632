#include "fluid.h"

#include <algorithm>

namespace dora::sim {

namespace {

// Of a medium's rate; what is left of it by rounding carries nothing.
constexpr double kNothing = 1e-9;

double roomFor(const FluidMedium& medium, const Load& load, const Crossing& crossing) {
  double room = medium.capacity(load.num_flows + 1) - load.used;
  return room > kNothing * medium.rate_bytes_per_s ? room / crossing.times : 0;
}

void serveInOrder(const std::vector<FluidMedium>& media, const std::vector<Flow*>& flows,
                  std::vector<Load>& loads) {
  for (Flow* flow : flows) {
    double rate = flow->limit_bytes_per_s;
    for (const Crossing& c : *flow->path) rate = std::min(rate, roomFor(media[c.medium], loads[c.medium], c));
    flow->rate_bytes_per_s = rate;
    if (rate <= 0) continue;
    for (const Crossing& c : *flow->path) {
      loads[c.medium].used += rate * c.times;
      loads[c.medium].num_flows++;
    }
  }
}

// Raises the rates of all open flows together until a medium is full or a flow at its limit, closes
// those, and goes on with the rest. See Bertsekas and Gallager, Data Networks, 1992, section 6.5.
void fillEvenly(const std::vector<FluidMedium>& media, const std::vector<Flow*>& flows,
                std::vector<Load>& loads) {
  for (const Flow* flow : flows)
    for (const Crossing& c : *flow->path) {
      loads[c.medium].weight += flow->weight * c.times;
      loads[c.medium].num_flows++;
    }
  std::vector<Flow*> open = flows;
  while (!open.empty()) {
    auto levelOf = [&](const Flow* flow) {
      double level = flow->limit_bytes_per_s / flow->weight;
      for (const Crossing& c : *flow->path) {
        const Load& load = loads[c.medium];
        double room = media[c.medium].capacity(load.num_flows) - load.used;
        level = std::min(level, std::max(room, 0.0) / load.weight);
      }
      return level;
    };
    double level = std::numeric_limits<double>::infinity();
    for (const Flow* flow : open) level = std::min(level, levelOf(flow));
    // Who is at the level is decided before any load changes.
    std::vector<Flow*> closed;
    for (Flow* flow : open)
      if (levelOf(flow) <= level * (1 + kNothing)) closed.push_back(flow);
    for (Flow* flow : closed) {
      flow->rate_bytes_per_s = level * flow->weight;
      for (const Crossing& c : *flow->path) {
        loads[c.medium].used += flow->rate_bytes_per_s * c.times;
        loads[c.medium].weight -= flow->weight * c.times;
      }
    }
    open.erase(std::remove_if(open.begin(), open.end(),
                              [&](Flow* flow) {
                                return std::find(closed.begin(), closed.end(), flow) != closed.end();
                              }),
               open.end());
  }
}

}  // namespace

double FluidMedium::capacity(std::size_t num_flows) const {
  if (num_flows == 0) return rate_bytes_per_s;
  return rate_bytes_per_s * efficiency[std::min(num_flows, efficiency.size()) - 1];
}

void shareMedia(const std::vector<FluidMedium>& media, Discipline discipline,
                const std::vector<Flow*>& flows, std::vector<Load>& loads) {
  for (const Flow* flow : flows)
    for (const Crossing& c : *flow->path) loads[c.medium] = {};
  if (discipline == Discipline::kPriority)
    serveInOrder(media, flows, loads);
  else
    fillEvenly(media, flows, loads);
}

void shareMedia(const std::vector<FluidMedium>& media, Discipline discipline,
                const std::vector<Flow*>& flows) {
  std::vector<Load> loads(media.size());
  shareMedia(media, discipline, flows, loads);
}

}  // namespace dora::sim
