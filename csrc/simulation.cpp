#include "simulation.h"

#include <algorithm>
#include <queue>
#include <tuple>

namespace dora::sim {

namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
// Of a transfer's bytes; what is left of them by rounding is sent.
constexpr double kRounding = 1e-12;
// Longer than any tail.
constexpr double kBehindAll = 1e6;

class Player {
 public:
  explicit Player(const Program& program)
      : program_(program),
        media_(program.media.get()),
        loads_(program.media->size()),
        is_carrying_(program.media->size()),
        now_s_(program.start_s),
        shared_s_(program.start_s),
        at_(program.ranks.size()),
        speed_(program.ranks.size(), 1.0),
        left_s_(program.ranks.size()),
        computing_(program.ranks.size()),
        ahead_s_(program.ranks.size()),
        idle_since_s_(program.ranks.size(), program.start_s),
        state_(program.transfers.size()),
        flows_(program.transfers.size()) {
    played_.busy_s.resize(program.ranks.size());
    played_.sent_bytes.resize(program.ranks.size());
    played_.received_bytes.resize(program.ranks.size());
    played_.medium_busy_s.resize(program.media->size());
    played_.transfers.resize(program.transfers.size());
    for (const auto& ops : program.ranks) played_.ops.emplace_back(ops.size());
    played_.end_s = program.start_s;
    for (std::size_t r = 0; r < program.rests.size(); r++) ahead_s_[r] = program.rests[r].saved_s;
    if (program.changes.empty()) return;
    changed_ = *program.media;
    media_ = &changed_;
  }

  Played run() {
    applyChanges();
    for (std::size_t t = 0; t < program_.transfers.size(); t++) start(t);
    for (std::size_t r = 0; r < program_.ranks.size(); r++) walk(r);
    while (step()) {
    }
    for (std::size_t r = 0; r < at_.size(); r++)
      if (at_[r] < program_.ranks[r].size()) blame(r);
    return std::move(played_);
  }

 private:
  enum class Happens : std::uint8_t { kComputed, kArrived, kReleased, kRankReleased };

  struct Event {
    double at_s;
    std::uint64_t number;  // what was planned first happens first
    Happens kind;
    std::uint32_t index;
    std::uint32_t version;
    bool operator>(const Event& other) const {
      return std::tie(at_s, number) > std::tie(other.at_s, other.number);
    }
  };

  struct Computing {
    double end_s = 0;
    std::uint32_t version = 0;  // of its end, which moves when the speed changes
    bool is_on = false;
  };

  struct State {
    bool is_sent = false, is_awaited = false, is_active = false, has_arrived = false;
    std::int32_t waiter = kNone;  // rank
    double remaining = 0;
    double done_s = kNever;
  };

  // One whose compute never ends goes before those that may only wait for it.
  void blame(std::size_t rank) {
    played_.end_s = kNever;
    bool is_first = played_.stuck == kNone;
    if (is_first || (computing_[rank].is_on && !computing_[played_.stuck].is_on))
      played_.stuck = static_cast<std::int32_t>(rank);
  }

  // Advances to the next event; false if nothing will ever happen.
  bool step() {
    if (is_dirty_) share();
    double event_s = events_.empty() ? kNever : events_.top().at_s;
    double change_s =
        next_change_ < program_.changes.size() ? program_.changes[next_change_].at_s : kNever;
    bool is_pending = !events_.empty() || !active_.empty() || num_computing_ > 0;
    double next_s = std::min(event_s, next_done_s_);
    if (!is_pending || (next_s == kNever && change_s == kNever)) return false;
    if (change_s <= next_s) {
      now_s_ = change_s;
      applyChanges();
    } else if (next_done_s_ <= event_s) {
      now_s_ = next_done_s_;
      finishFlows();
    } else {
      Event event = events_.top();
      events_.pop();
      now_s_ = event.at_s;
      handle(event);
    }
    return true;
  }

  void handle(const Event& event) {
    std::uint32_t i = event.index;
    switch (event.kind) {
      case Happens::kComputed:
        if (event.version != computing_[i].version) return;
        endCompute(i);
        return walk(i);
      case Happens::kArrived:
        return arrive(i);
      case Happens::kReleased:
        return start(i);
      case Happens::kRankReleased:
        return walk(i);
    }
  }

  // Goes on with a rank until it computes, waits or has finished.
  void walk(std::size_t rank) {
    const auto& ops = program_.ranks[rank];
    while (at_[rank] < ops.size()) {
      const Op& op = ops[at_[rank]];
      if (op.kind == Op::kCompute) {
        if (op.transfer != kNone && !state_[op.transfer].has_arrived) {
          state_[op.transfer].waiter = static_cast<std::int32_t>(rank);
          return;
        }
        if (op.not_before_s > now_s_)
          return plan(op.not_before_s, Happens::kRankReleased, rank);
        Interval& span = played_.ops[rank][at_[rank]];
        span.start_s = span.end_s = now_s_;
        if (op.duration_s > 0) return beginCompute(rank, op.duration_s);
        played_.end_s = std::max(played_.end_s, now_s_);
      } else {
        State& state = state_[op.transfer];
        (op.kind == Op::kSend ? state.is_sent : state.is_awaited) = true;
        start(op.transfer);
      }
      at_[rank]++;
    }
  }

  void beginCompute(std::size_t rank, double duration_s) {
    Computing& computing = computing_[rank];
    if (!program_.rests.empty()) duration_s -= sprinted(rank, duration_s);
    computing.is_on = true;
    num_computing_++;
    computing.end_s = speed_[rank] > 0 ? now_s_ + duration_s / speed_[rank] : kNever;
    left_s_[rank] = duration_s;
    planEnd(rank);
  }

  // Returns by how much a rank is faster because it has waited before.
  double sprinted(std::size_t rank, double duration_s) {
    const Rest& rest = program_.rests[rank];
    double regained_s = ahead_s_[rank] + now_s_ - idle_since_s_[rank];
    double saved_s = std::min({regained_s, rest.saved_s, duration_s * (1 - 1 / rest.sprint)});
    ahead_s_[rank] = std::min(regained_s, rest.saved_s) - saved_s;
    return saved_s;
  }

  void planEnd(std::size_t rank) {
    Computing& computing = computing_[rank];
    computing.version++;
    if (computing.end_s < kNever)
      plan(computing.end_s, Happens::kComputed, rank, computing.version);
  }

  void endCompute(std::size_t rank) {
    Interval& span = played_.ops[rank][at_[rank]];
    span.end_s = now_s_;
    played_.busy_s[rank] += span.end_s - span.start_s;
    played_.end_s = std::max(played_.end_s, now_s_);
    idle_since_s_[rank] = now_s_;
    computing_[rank].is_on = false;
    num_computing_--;
    at_[rank]++;
  }

  // Lets a transfer move if nothing holds it back any more.
  void start(std::size_t t) {
    const Transfer& transfer = program_.transfers[t];
    State& state = state_[t];
    bool is_held = (transfer.needs_send && !state.is_sent) ||
                   (transfer.needs_receive && !state.is_awaited);
    if (is_held || state.is_active || state.has_arrived || state.done_s < kNever) return;
    if (transfer.not_before_s > now_s_) return plan(transfer.not_before_s, Happens::kReleased, t);
    played_.sent_bytes[transfer.src] += transfer.num_bytes;
    played_.received_bytes[transfer.dst] += transfer.num_bytes;
    played_.transfers[t].start_s = now_s_;
    if (transfer.num_bytes <= 0) {
      state.done_s = now_s_;
      return plan(now_s_ + transfer.latency_s, Happens::kArrived, t);
    }
    state.is_active = true;
    state.remaining = transfer.num_bytes;
    Flow& flow = flows_[t];
    flow.path = transfer.path.get();
    flow.priority = transfer.priority;
    flow.limit_bytes_per_s = transfer.pace_bytes_per_s;
    flow.rate_bytes_per_s = 0;
    auto place = std::upper_bound(active_.begin(), active_.end(), &flow,
                                  [](const Flow* a, const Flow* b) { return a->priority > b->priority; });
    active_.insert(place, &flow);
    is_dirty_ = true;
  }

  // Books what the flows have carried since the last time.
  void advance() {
    double passed_s = now_s_ - shared_s_;
    shared_s_ = now_s_;
    if (passed_s <= 0) return;
    countMedia(passed_s);
    for (Flow* flow : active_) {
      State& state = state_[indexOf(flow)];
      state.remaining = std::max(state.remaining - flow->rate_bytes_per_s * passed_s, 0.0);
    }
  }

  // Gives all flows new rates.
  void share() {
    advance();
    shareMedia(*media_, program_.discipline, active_, loads_);
    next_done_s_ = kNever;
    for (Flow* flow : active_) {
      State& state = state_[indexOf(flow)];
      state.done_s = flow->rate_bytes_per_s > 0 ? now_s_ + state.remaining / flow->rate_bytes_per_s
                                                : kNever;
      // Or a more urgent flow that starts when this one ends would hold it up for no byte.
      if (state.remaining <= kRounding * program_.transfers[indexOf(flow)].num_bytes)
        state.done_s = now_s_;
      next_done_s_ = std::min(next_done_s_, state.done_s);
    }
    is_dirty_ = false;
  }

  // Only the media that flows cross: there may be thousands of others.
  void countMedia(double passed_s) {
    for (const Flow* flow : active_)
      if (flow->rate_bytes_per_s > 0)
        for (const Crossing& crossing : *flow->path) is_carrying_[crossing.medium] = true;
    for (const Flow* flow : active_)
      for (const Crossing& crossing : *flow->path) {
        if (is_carrying_[crossing.medium]) played_.medium_busy_s[crossing.medium] += passed_s;
        is_carrying_[crossing.medium] = false;
      }
  }

  void finishFlows() {
    advance();
    auto is_done = [&](const Flow* flow) { return state_[indexOf(flow)].done_s <= now_s_; };
    std::vector<Flow*> done;
    std::copy_if(active_.begin(), active_.end(), std::back_inserter(done), is_done);
    active_.erase(std::remove_if(active_.begin(), active_.end(), is_done), active_.end());
    for (const Flow* flow : done) {
      std::size_t t = indexOf(flow);
      state_[t].is_active = false;
      plan(now_s_ + program_.transfers[t].latency_s, Happens::kArrived, t);
    }
    is_dirty_ = true;
  }

  void arrive(std::size_t t) {
    State& state = state_[t];
    state.has_arrived = true;
    played_.transfers[t].end_s = now_s_;
    played_.end_s = std::max(played_.end_s, now_s_);
    if (state.waiter != kNone) walk(state.waiter);
  }

  void applyChanges() {
    const auto& changes = program_.changes;
    for (; next_change_ < changes.size() && changes[next_change_].at_s <= now_s_; next_change_++) {
      const Change& change = changes[next_change_];
      if (change.is_medium) {
        double given = (*program_.media)[change.index].rate_bytes_per_s;
        changed_[change.index].rate_bytes_per_s = given * change.factor;
        is_dirty_ = true;
      } else {
        changeSpeed(change.index, change.factor);
      }
    }
  }

  void changeSpeed(std::size_t rank, double speed) {
    Computing& computing = computing_[rank];
    if (computing.is_on) {
      if (computing.end_s < kNever) left_s_[rank] = (computing.end_s - now_s_) * speed_[rank];
      computing.end_s = speed > 0 ? now_s_ + left_s_[rank] / speed : kNever;
      planEnd(rank);
    }
    speed_[rank] = speed;
  }

  void plan(double at_s, Happens kind, std::size_t index, std::uint32_t version = 0) {
    events_.push({at_s, num_planned_++, kind, static_cast<std::uint32_t>(index), version});
  }

  std::size_t indexOf(const Flow* flow) const { return flow - flows_.data(); }

  const Program& program_;
  const std::vector<FluidMedium>* media_;
  std::vector<FluidMedium> changed_;  // media as the changes so far have left them, if there are any
  std::vector<Load> loads_;         // for shareMedia
  std::vector<bool> is_carrying_;   // all false but in countMedia
  double now_s_;
  double shared_s_;  // when the rates were last valid from
  double next_done_s_ = kNever;
  std::size_t num_computing_ = 0;
  bool is_dirty_ = false;
  std::size_t next_change_ = 0;
  std::uint64_t num_planned_ = 0;
  std::vector<std::size_t> at_;  // per rank, the op it is at
  std::vector<double> speed_;
  std::vector<double> left_s_;  // per rank, of a compute at speed 1 when its speed last changed
  std::vector<Computing> computing_;
  std::vector<double> ahead_s_, idle_since_s_;  // per rank, see Rest; as of its last compute
  std::vector<State> state_;
  std::vector<Flow> flows_;  // per transfer; those under way are in active_
  std::vector<Flow*> active_;
  std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events_;
  Played played_;
};

// Seconds from the first byte to the arrival of a transfer that has all media for itself.
double aloneS(const Program& program, const Transfer& transfer) {
  double rate = transfer.pace_bytes_per_s;
  for (const Crossing& c : *transfer.path)
    rate = std::min(rate, (*program.media)[c.medium].capacity(1) / c.times);
  return (transfer.num_bytes > 0 ? transfer.num_bytes / rate : 0) + transfer.latency_s;
}

}  // namespace

Played play(const Program& program) { return Player(program).run(); }

std::vector<double> tails(const Program& program) {
  // Backwards through all lists at once: a send needs the tail of the compute that waits for it.
  std::vector<double> tail_s(program.transfers.size(), 0.0);
  std::vector<bool> is_known(program.transfers.size(), true);
  for (const auto& ops : program.ranks)
    for (const Op& op : ops)
      if (op.kind == Op::kCompute && op.transfer != kNone) is_known[op.transfer] = false;
  std::vector<std::size_t> left;
  std::vector<double> rest_s(program.ranks.size(), 0.0);
  std::vector<std::size_t> work;
  std::vector<std::vector<std::size_t>> blocked(program.transfers.size());
  for (std::size_t r = 0; r < program.ranks.size(); r++) {
    left.push_back(program.ranks[r].size());
    work.push_back(r);
  }
  while (!work.empty()) {
    std::size_t r = work.back();
    work.pop_back();
    for (; left[r] > 0; left[r]--) {
      const Op& op = program.ranks[r][left[r] - 1];
      if (op.kind == Op::kSend) {
        if (!is_known[op.transfer]) {
          blocked[op.transfer].push_back(r);
          break;
        }
        double path_s = aloneS(program, program.transfers[op.transfer]) + tail_s[op.transfer];
        rest_s[r] = std::max(rest_s[r], path_s);
      } else if (op.kind == Op::kCompute) {
        rest_s[r] += op.duration_s;
        if (op.transfer == kNone) continue;
        tail_s[op.transfer] = rest_s[r];
        is_known[op.transfer] = true;
        for (std::size_t other : blocked[op.transfer]) work.push_back(other);
        blocked[op.transfer].clear();
      }
    }
  }
  return tail_s;
}

std::vector<double> priorities(const Program& program) {
  std::vector<double> priority = tails(program);
  for (std::size_t t = 0; t < priority.size(); t++)
    if (program.transfers[t].is_reduction) priority[t] -= kBehindAll;
  return priority;
}

}  // namespace dora::sim
