#include "chains.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <limits>
#include <unordered_map>

namespace dora::sim {

namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr std::size_t kMaxDevices = 256;
constexpr std::size_t kMaxMedia = 8;
using Used = std::bitset<kMaxDevices>;

struct Label {
  double v_s = 0, reduced_s = 0, pass_s = 0, work_j = 0, idle_w = 0;
  double bound_s = 0, bound_j = 0;
  std::array<double, kMaxMedia> load_s{};
  Used used;
  std::int32_t rest = -1;   // in the pool, the stages behind
  std::int32_t group = -1;  // of the first stage
  std::int32_t end = 0;     // block after that stage's last
  std::int32_t window = 0;  // of the first stage, at the least depth
  bool is_reduced = false;  // any of the stages, by an all-reduce
};

struct Bucket {
  std::vector<Label> labels;
  double limit = kNever;  // a label has to be better than this once the bucket is full
};

// What the blocks from one to another cost as a stage on a group.
struct Stage {
  std::vector<int> counts;
  // Of one micro-batch on the fastest replica: there and back, and both ends on different ones.
  double one_s, ends_s, one_forward_s;
  double all_s, waiting_s, reduced_s, work_j;
  std::array<double, kMaxMedia> load_s{};
  bool is_reduced = false;  // by an all-reduce
};

struct Hop {
  double down_s = 0, round_s = 0, occupied_s = 0, radio_j = 0;
  std::array<double, kMaxMedia> load_s{};
};

class Search {
 public:
  explicit Search(const ChainProblem& p) : p_(p), blocks_(p.num_blocks + 1), buckets_(blocks_) {
    for (const auto& group : p.groups) {
      Used members;
      for (int d : group) members.set(d);
      members_.push_back(members);
    }
    lower_twins_.resize(p.num_devices);
    for (int d = 0; d < p.num_devices; d++)
      for (int other = 0; other < d; other++)
        if (p.twins[other] == p.twins[d]) lower_twins_[d].push_back(other);
    prepareRemainders();
  }

  Chains run() {
    buckets_[p_.num_blocks].labels.emplace_back();  // no stage yet
    for (int end = p_.num_blocks; end >= 0; end--) {
      prune(buckets_[end]);
      // Labels behind others are kept for good, since those name them.
      for (Label& label : buckets_[end].labels) pool_.push_back(label);
      buckets_[end].labels = {};
      if (end > 0) {
        expand(end);
        first_kept_ = pool_.size();
      }
    }
    return collect();
  }

 private:
  double prefix(const std::vector<double>& sums, int device, int first, int end) const {
    const double* row = &sums[static_cast<std::size_t>(device) * blocks_];
    return row[end] - row[first];
  }
  double span(const std::vector<double>& values, int first, int end) const {
    return values[static_cast<std::size_t>(first) * blocks_ + end];
  }
  std::size_t pair(int src, int dst) const {
    return static_cast<std::size_t>(src) * p_.num_devices + dst;
  }

  // No device does a block faster than the best one, nor more of the rest than its best ratio to it.
  void prepareRemainders() {
    before_s_.assign(blocks_, 0);
    before_j_.assign(blocks_, 0);
    before_forward_s_.assign(blocks_, 0);
    ratio_.assign(p_.num_devices, 0);
    for (int b = 0; b < p_.num_blocks; b++) {
      double best_s = kNever, least_j = kNever, forward_s = kNever;
      for (int d = 0; d < p_.num_devices; d++) {
        best_s = std::min(best_s, blockS(d, b));
        forward_s = std::min(forward_s, prefix(p_.forward_s, d, b, b + 1));
        least_j = std::min(least_j, blockS(d, b) * p_.extra_w[d]);
      }
      before_s_[b + 1] = before_s_[b] + best_s;
      before_forward_s_[b + 1] = before_forward_s_[b] + forward_s;
      before_j_[b + 1] = before_j_[b] + least_j * p_.num_microbatches;
      for (int d = 0; d < p_.num_devices; d++) {
        double own_s = blockS(d, b);
        ratio_[d] = std::max(ratio_[d], own_s > 0 ? best_s / own_s : 1.0);
      }
    }
  }
  double blockS(int d, int b) const {
    return prefix(p_.forward_s, d, b, b + 1) + prefix(p_.backward_s, d, b, b + 1);
  }

  void expand(int end) {
    std::vector<std::size_t> fitting;
    std::vector<Hop> hops;
    for (std::size_t g = 0; g < p_.groups.size(); g++) {
      fitting.clear();
      hops.clear();
      for (std::size_t l = first_kept_; l < pool_.size(); l++) {
        const Label& rest = pool_[l];
        if ((rest.used & members_[g]).any() || !isCanonical(p_.groups[g], rest.used)) continue;
        Hop hop = rest.group < 0 ? Hop() : hopBetween(g, rest.group, end);
        if (!(hop.round_s < kNever)) continue;
        fitting.push_back(l);
        hops.push_back(hop);
      }
      if (fitting.empty()) continue;
      for (int first = end - 1; first >= 0; first--) {
        if (!fitsAlone(g, first, end)) break;  // more blocks need even more
        Stage stage = stageOf(g, first, end);
        if (stage.counts.empty()) continue;
        for (std::size_t i = 0; i < fitting.size(); i++) extend(g, first, end, stage, fitting[i], hops[i]);
        if (buckets_[first].labels.size() > 4 * p_.width) prune(buckets_[first]);
      }
    }
  }

  // Of equal devices the one with the lower index is used first, so that none is tried twice.
  bool isCanonical(const std::vector<int>& group, const Used& used) const {
    for (int d : group)
      for (int other : lower_twins_[d])
        if (!used[other] && std::find(group.begin(), group.end(), other) == group.end()) return false;
    return true;
  }

  bool fitsAlone(std::size_t g, int first, int end) const {
    for (int d : p_.groups[g])
      if (span(p_.state_bytes, first, end) > p_.memory_bytes[d]) return false;
    return true;
  }

  Stage stageOf(std::size_t g, int first, int end) const {
    const auto& group = p_.groups[g];
    std::vector<double> times_s;
    for (int d : group)
      times_s.push_back(prefix(p_.forward_s, d, first, end) + prefix(p_.backward_s, d, first, end));
    Stage stage;
    stage.counts = shareMicrobatches(times_s, p_.num_microbatches);
    stage.one_s = stage.one_forward_s = kNever;
    stage.all_s = stage.waiting_s = stage.reduced_s = stage.work_j = 0;
    double one_backward_s = kNever;
    for (std::size_t r = 0; r < group.size(); r++) {
      // A replica without any micro-batch belongs to another, smaller group.
      if (stage.counts[r] == 0) return {};
      double f = prefix(p_.forward_s, group[r], first, end), b = times_s[r] - f;
      int n = stage.counts[r];
      stage.all_s = std::max(stage.all_s, n * times_s[r]);
      stage.one_s = std::min(stage.one_s, times_s[r]);
      stage.one_forward_s = std::min(stage.one_forward_s, f);
      one_backward_s = std::min(one_backward_s, b);
      stage.waiting_s = std::max({stage.waiting_s, n * f + b, f + n * b});
      stage.work_j += n * times_s[r] * p_.extra_w[group[r]];
      stage.reduced_s = std::max(stage.reduced_s, n * times_s[r] + reduce(stage, group, r, first, end));
    }
    stage.ends_s = stage.one_forward_s + one_backward_s;
    return stage;
  }

  // Adds what a replica of a ring all-reduce loads the media with, and returns how long its own link
  // carries that, which can not start before its own last backward.
  double reduce(Stage& stage, const std::vector<int>& group, std::size_t r, int first, int end) const {
    std::size_t k = group.size(), hop = pair(group[r], group[(r + 1) % k]);
    double bytes = k > 1 ? 2.0 * (k - 1) / k * span(p_.gradient_bytes, first, end) : 0;
    if (bytes <= 0) return 0;
    stage.is_reduced = true;
    for (std::size_t m = 0; m < p_.medium_s_per_byte.size(); m++)
      stage.load_s[m] += bytes * p_.medium_s_per_byte[m][hop];
    return bytes * p_.s_per_byte[hop] + p_.latency_s[hop];
  }

  Hop hopBetween(std::size_t g, std::size_t h, int block) const {
    double bytes = p_.boundary_bytes[block];
    Hop hop;
    hop.down_s = hop.radio_j = kNever;
    double up_s = kNever, down_busy_s = kNever, up_busy_s = kNever;
    std::array<double, kMaxMedia> down_load, up_load;
    down_load.fill(kNever);
    up_load.fill(kNever);
    for (int a : p_.groups[g])
      for (int b : p_.groups[h]) {
        std::size_t down = pair(a, b), up = pair(b, a);
        if (!(p_.latency_s[down] < kNever) || (p_.is_training && !(p_.latency_s[up] < kNever))) {
          hop.round_s = kNever;
          return hop;
        }
        hop.down_s = std::min(hop.down_s, bytes * p_.s_per_byte[down] + p_.hops * p_.latency_s[down]);
        up_s = std::min(up_s, bytes * p_.s_per_byte[up] + p_.latency_s[up]);
        down_busy_s = std::min(down_busy_s, bytes * p_.s_per_byte[down]);
        up_busy_s = std::min(up_busy_s, bytes * p_.s_per_byte[up]);
        double radio_j = p_.tx_j_per_byte[a] + p_.rx_j_per_byte[b];
        if (p_.is_training) radio_j += p_.tx_j_per_byte[b] + p_.rx_j_per_byte[a];
        hop.radio_j = std::min(hop.radio_j, bytes * p_.num_microbatches * radio_j);
        for (std::size_t m = 0; m < p_.medium_s_per_byte.size(); m++) {
          down_load[m] = std::min(down_load[m], p_.medium_s_per_byte[m][down]);
          up_load[m] = std::min(up_load[m], p_.medium_s_per_byte[m][up]);
        }
      }
    std::size_t num_pairs = p_.groups[g].size() * p_.groups[h].size();
    // Replicas spread the messages over their links; the fullest has at least this many more.
    double others = (p_.num_microbatches + num_pairs - 1) / num_pairs - 1;
    hop.round_s = hop.down_s + (p_.is_training ? up_s : 0);
    hop.occupied_s = others * std::max(down_busy_s, p_.is_training ? up_busy_s : 0);
    for (std::size_t m = 0; m < p_.medium_s_per_byte.size(); m++)
      hop.load_s[m] = p_.num_microbatches * bytes * (down_load[m] + (p_.is_training ? up_load[m] : 0));
    return hop;
  }

  void extend(std::size_t g, int first, int end, const Stage& stage, std::size_t l, const Hop& hop) {
    const Label& rest = pool_[l];
    double after_s = hop.round_s + rest.pass_s;
    double behind_s = rest.group < 0 ? 0 : hop.round_s + std::max(rest.v_s, rest.pass_s + hop.occupied_s);
    double v_s = std::max({stage.all_s, stage.waiting_s + after_s, stage.ends_s + behind_s});
    // Most end here: the rest of the bound would only raise it.
    Bucket& bucket = buckets_[first];
    if (!p_.by_energy && v_s + before_s_[first] >= bucket.limit)
      return drop(v_s + before_s_[first]);
    Label label;
    label.window = rest.window + static_cast<std::int32_t>(p_.groups[g].size());
    if (!fits(g, first, end, stage, label.window)) return;
    label.v_s = v_s;
    label.reduced_s = std::max(stage.reduced_s, stage.one_forward_s + hop.down_s + rest.reduced_s);
    label.pass_s = stage.one_s + after_s;
    label.work_j = stage.work_j + hop.radio_j + rest.work_j;
    label.idle_w = rest.idle_w;
    for (int d : p_.groups[g]) label.idle_w += p_.idle_w[d];
    label.used = rest.used | members_[g];
    label.is_reduced = rest.is_reduced || stage.is_reduced;
    label.rest = static_cast<std::int32_t>(l);
    label.group = static_cast<std::int32_t>(g);
    label.end = end;
    for (std::size_t m = 0; m < p_.medium_s_per_byte.size(); m++)
      label.load_s[m] = rest.load_s[m] + stage.load_s[m] + hop.load_s[m];
    bound(label, first, stage);
    if (label.bound_s >= p_.cutoff_s || label.bound_j >= p_.cutoff_j) return;
    if (score(label) >= bucket.limit)
      drop(score(label));
    else
      bucket.labels.push_back(label);
  }

  // Remembers the least bound of what the width has cut off.
  void drop(double bound) { dropped_ = std::min(dropped_, bound); }

  // Among M in a row, some `window` in a row hold at least counts / (M / window) of a replica's.
  bool fits(std::size_t g, int first, int end, const Stage& stage, int window) const {
    const auto& group = p_.groups[g];
    double fixed = span(p_.state_bytes, first, end) + span(p_.buffer_bytes, first, end);
    int m = p_.num_microbatches, rounds = (m + std::min(window, m) - 1) / std::min(window, m);
    for (std::size_t r = 0; r < group.size(); r++) {
      int held = p_.is_training ? (stage.counts[r] + rounds - 1) / rounds : 1;
      if (fixed + held * span(p_.activation_bytes, first, end) > p_.memory_bytes[group[r]]) return false;
    }
    return true;
  }

  void bound(Label& label, int first, const Stage& stage) const {
    double input_s = 0, input_load = 0;
    if (first == 0 && p_.source >= 0) addInput(label, input_s, input_load);
    double least_s = std::max(label.v_s, label.reduced_s) + before_s_[first] + input_s;
    // A medium that is never idle still waits for the first stage's first forward, and the first
    // stage for its last backward, unless gradients are reduced meanwhile or after it.
    double ends_s = label.is_reduced ? before_forward_s_[first] : before_s_[first];
    if (first == 0 && input_load == 0) ends_s = label.is_reduced ? stage.one_forward_s : stage.ends_s;
    for (std::size_t m = 0; m < p_.medium_s_per_byte.size(); m++)
      if (label.load_s[m] > 0) least_s = std::max(least_s, label.load_s[m] + ends_s);
    if (first > 0) {
      double speed = 0;
      for (int d = 0; d < p_.num_devices; d++)
        if (!label.used[d]) speed += ratio_[d];
      least_s = std::max(least_s, speed > 0 ? before_s_[first] * p_.num_microbatches / speed : kNever);
    }
    label.bound_s = least_s;
    label.bound_j = label.work_j + before_j_[first] + label.idle_w * least_s;
  }

  void addInput(Label& label, double& input_s, double& input_load) const {
    const auto& group = p_.groups[label.group];
    double bytes = p_.boundary_bytes[0];
    std::array<double, kMaxMedia> load;
    load.fill(kNever);
    input_s = kNever;
    for (int d : group) {
      if (d == p_.source) {
        input_s = 0;
        return;
      }
      std::size_t hop = pair(p_.source, d);
      input_s = std::min(input_s, bytes * p_.s_per_byte[hop] + p_.latency_s[hop]);
      for (std::size_t m = 0; m < p_.medium_s_per_byte.size(); m++)
        load[m] = std::min(load[m], p_.medium_s_per_byte[m][hop]);
    }
    for (std::size_t m = 0; m < p_.medium_s_per_byte.size(); m++) {
      label.load_s[m] += p_.num_microbatches * bytes * load[m];
      input_load += load[m];
    }
  }

  double score(const Label& label) const { return p_.by_energy ? label.bound_j : label.bound_s; }

  // Keeps the `width` best, at most `per_state` of those that go on in the same way.
  void prune(Bucket& bucket) {
    auto& labels = bucket.labels;
    std::stable_sort(labels.begin(), labels.end(),
                     [&](const Label& a, const Label& b) { return score(a) < score(b); });
    std::unordered_map<std::size_t, std::size_t> num_kept;
    std::size_t kept = 0;
    for (std::size_t l = 0; l < labels.size() && kept < p_.width; l++) {
      std::size_t state = std::hash<Used>()(labels[l].used) * 31 + static_cast<std::size_t>(labels[l].group + 1);
      if (num_kept[state]++ < p_.per_state)
        std::swap(labels[kept++], labels[l]);
    }
    for (std::size_t l = kept; l < labels.size(); l++) drop(score(labels[l]));
    labels.resize(kept);
    if (kept == p_.width) bucket.limit = score(labels.back());
  }

  Chains collect() const {
    Chains chains;
    chains.dropped_bound = dropped_;
    for (std::size_t l = first_kept_; l < pool_.size(); l++) {
      Chain chain;
      chain.bound_s = pool_[l].bound_s;
      chain.bound_j = pool_[l].bound_j;
      for (std::int32_t at = static_cast<std::int32_t>(l); pool_[at].group >= 0; at = pool_[at].rest) {
        chain.groups.push_back(pool_[at].group);
        chain.ends.push_back(pool_[at].end);
      }
      chains.found.push_back(std::move(chain));
    }
    return chains;
  }

  const ChainProblem& p_;
  std::size_t blocks_;
  std::vector<Used> members_;
  std::vector<std::vector<int>> lower_twins_;
  std::vector<double> before_s_, before_forward_s_, before_j_, ratio_;
  std::vector<Label> pool_;
  std::size_t first_kept_ = 0;   // in the pool, of the block that is being expanded
  std::vector<Bucket> buckets_;  // per first block
  double dropped_ = kNever;
};

}  // namespace

Chains enumerateChains(const ChainProblem& problem) { return Search(problem).run(); }

std::vector<int> shareMicrobatches(const std::vector<double>& times_s, int num_microbatches) {
  if (times_s.size() == 1) return {num_microbatches};
  std::vector<int> counts(times_s.size());
  for (int m = 0; m < num_microbatches; m++) {
    std::size_t first = 0;
    for (std::size_t r = 1; r < counts.size(); r++)
      if ((counts[r] + 1) * times_s[r] < (counts[first] + 1) * times_s[first]) first = r;
    counts[first]++;
  }
  return counts;
}

}  // namespace dora::sim
