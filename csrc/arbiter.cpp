#include "arbiter.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>

namespace dora {
namespace {

// A NaN would compare as equal to everything.
Priority sane(Priority priority) {
  const double deadline =
      std::isnan(priority.deadline) ? std::numeric_limits<double>::infinity() : priority.deadline;
  return {std::min<std::uint8_t>(priority.traffic_class, kWeights), deadline};
}

std::uint8_t agedClass(Priority priority, std::uint8_t steps) {
  if (priority.traffic_class <= kActivation) return priority.traffic_class;
  return static_cast<std::uint8_t>(std::max(kActivation + 0, priority.traffic_class - steps));
}

}  // namespace

Arbiter::Arbiter(double aging_s) : aging_s_(aging_s) {
  if (!(aging_s > 0)) {
    throw std::invalid_argument("aging_s is " + std::to_string(aging_s) +
                                "; use more than 0, or infinity for no ageing");
  }
}

std::vector<Arbiter::Order> Arbiter::want(std::uint32_t rank, Priority priority, double now_s) {
  auto [entry, is_new] = wishes_.try_emplace(rank, Wish{{}, 0, now_s, orders_});
  entry->second.priority = sane(priority);
  if (is_new) ++orders_;
  return decide(now_s);
}

std::vector<Arbiter::Order> Arbiter::giveBack(std::uint32_t rank, double now_s) {
  wishes_.erase(rank);
  if (holder_ == rank) holder_.reset();
  return decide(now_s);
}

std::vector<Arbiter::Order> Arbiter::tick(double now_s) { return decide(now_s); }

void Arbiter::age(double now_s) {
  for (auto& [rank, wish] : wishes_) {
    if (now_s - wish.since_s < aging_s_) continue;
    wish.since_s = now_s;
    if (holder_ == rank) {
      wish.steps = 0;
      wish.order = orders_++;
    } else if (agedClass(wish.priority, wish.steps) > kActivation) {
      ++wish.steps;
    }
  }
}

bool Arbiter::goesBefore(const Wish& a, const Wish& b) {
  const auto key = [](const Wish& wish) {
    return std::make_tuple(agedClass(wish.priority, wish.steps), wish.priority.deadline,
                           wish.order);
  };
  return key(a) < key(b);
}

Arbiter::Wishes::iterator Arbiter::first() {
  auto best = wishes_.end();
  for (auto entry = wishes_.begin(); entry != wishes_.end(); ++entry) {
    if (holder_ == entry->first) continue;
    if (best == wishes_.end() || goesBefore(entry->second, best->second)) best = entry;
  }
  return best;
}

std::vector<Arbiter::Order> Arbiter::decide(double now_s) {
  age(now_s);
  const auto best = first();
  if (best == wishes_.end()) return {};
  auto& [rank, wish] = *best;
  if (!holder_) {
    holder_ = rank;
    is_revoked_ = false;
    wish.since_s = now_s;
    return {{Kind::kAllow, rank}};
  }
  if (is_revoked_ || !goesBefore(wish, wishes_.at(*holder_))) return {};
  is_revoked_ = true;
  return {{Kind::kRevoke, *holder_}};
}

}  // namespace dora
