// Chains of groups: all of them while the beam is wide, best bound first, and fewer when it is not.
#include <algorithm>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "chains.h"
#include "check.h"

using namespace dora::sim;

// Three unlike devices, four blocks, every single device and pair a group.
static ChainProblem problem() {
  ChainProblem p;
  p.num_blocks = 4;
  p.num_devices = 3;
  p.num_microbatches = 8;  // enough that no replica goes without any
  for (int d = 0; d < 3; d++)
    for (int b = 0; b <= 4; b++) {
      p.forward_s.push_back(b * (1.0 + d));
      p.backward_s.push_back(2.0 * b * (1.0 + d));
    }
  p.state_bytes.assign(25, 1);
  p.gradient_bytes.assign(25, 1);
  p.activation_bytes.assign(25, 1);
  p.buffer_bytes.assign(25, 1);
  p.boundary_bytes.assign(5, 1);
  p.memory_bytes.assign(3, 1e9);
  p.idle_w.assign(3, 1);
  p.extra_w.assign(3, 2);
  p.tx_j_per_byte.assign(3, 0);
  p.rx_j_per_byte.assign(3, 0);
  p.s_per_byte.assign(9, 0.1);
  p.latency_s.assign(9, 0.01);
  p.medium_s_per_byte = {std::vector<double>(9, 0.2)};
  p.groups = {{0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2}, {0, 1, 2}};
  p.twins = {0, 1, 2};
  p.cutoff_s = p.cutoff_j = std::numeric_limits<double>::infinity();
  return p;
}

static void allAreFoundOnce() {
  Chains chains = enumerateChains(problem());
  // Ordered partitions of subsets of three devices into k groups, times C(3, k - 1) cuts:
  // 7 of one group, 12 of two (3 pairs in 2 orders, 3 with a pair in 2 orders), 6 of three.
  CHECK(chains.found.size() == 7 * 1 + 12 * 3 + 6 * 3);
  CHECK(!(chains.dropped_bound < std::numeric_limits<double>::infinity()));
  std::set<std::pair<std::vector<std::int32_t>, std::vector<std::int32_t>>> seen;
  double last_s = 0;
  for (const Chain& chain : chains.found) {
    CHECK(seen.emplace(chain.groups, chain.ends).second);
    CHECK(chain.ends.back() == 4 && std::is_sorted(chain.ends.begin(), chain.ends.end()));
    CHECK(chain.bound_s >= last_s);
    last_s = chain.bound_s;
  }
}

static void aNarrowBeamSaysWhatItLeftOut() {
  ChainProblem narrow = problem();
  narrow.width = 2;
  Chains few = enumerateChains(narrow);
  CHECK(few.found.size() <= 2 && !few.found.empty());
  CHECK(few.dropped_bound < std::numeric_limits<double>::infinity());
  double best_s = enumerateChains(problem()).found.front().bound_s;
  CHECK(std::min(few.dropped_bound, few.found.front().bound_s) <= best_s);
}

static void memoryAndLinksExclude() {
  ChainProblem p = problem();
  p.memory_bytes[2] = 1;
  std::fill(p.latency_s.begin(), p.latency_s.end(), std::numeric_limits<double>::infinity());
  for (const Chain& chain : enumerateChains(p).found) CHECK(chain.groups.size() == 1 && chain.groups[0] != 2);
}

int main() {
  allAreFoundOnce();
  aNarrowBeamSaysWhatItLeftOut();
  memoryAndLinksExclude();
  CHECK(shareMicrobatches({1.0, 3.0}, 4) == (std::vector<int>{3, 1}));
  return 0;
}
