#include "media.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace dora {

namespace {

// A sender that does not return a revoked medium for so long has stopped: it is lent on.
constexpr double kReturnLimitS = 0.5;

bool goesBefore(const Priority& a, const Priority& b) {
  return std::pair(a.traffic_class, a.deadline) < std::pair(b.traffic_class, b.deadline);
}

}  // namespace

Media::Media(std::uint32_t self, double aging_s, Send send)
    : self_(self), aging_s_(aging_s), send_(std::move(send)) {}

void Media::configure(const MediaOptions& options) {
  media_.clear();
  of_peer_ = options.media;
  for (auto& [peer, numbers] : of_peer_) {
    std::sort(numbers.begin(), numbers.end());
    numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  }
  for (auto [number, rank] : options.arbiters) {
    Medium& medium = media_[number];
    medium.number = number;
    medium.arbiter_rank = rank;
    if (rank == self_) medium.arbiter = std::make_unique<Arbiter>(aging_s_);
  }
}

bool Media::mayUse(std::uint32_t peer, Priority priority, double now_s) {
  auto numbers = of_peer_.find(peer);
  if (numbers == of_peer_.end()) return true;
  bool may_use = true;
  for (std::uint32_t number : numbers->second) {
    auto found = media_.find(number);
    if (found == media_.end()) continue;  // nobody lends it
    Medium& medium = found->second;
    if (!may_use) {  // who waits for a medium holds none behind it
      leave(medium, peer, now_s);
      continue;
    }
    medium.users[peer] = priority;
    if (medium.is_free) continue;
    tell(medium, now_s);
    may_use = medium.is_held;
  }
  return may_use;
}

void Media::done(std::uint32_t peer, double now_s) {
  auto numbers = of_peer_.find(peer);
  if (numbers == of_peer_.end()) return;
  for (std::uint32_t number : numbers->second) {
    auto found = media_.find(number);
    if (found != media_.end()) leave(found->second, peer, now_s);
  }
}

void Media::leave(Medium& medium, std::uint32_t peer, double now_s) {
  if (medium.users.erase(peer) == 0) return;
  if (medium.users.empty()) return giveBack(medium, now_s);
  if (!medium.is_free) tell(medium, now_s);
}

// Tells the arbiter the most urgent wish, if that has changed.
void Media::tell(Medium& medium, double now_s) {
  Priority best = medium.users.begin()->second;
  for (auto& [peer, priority] : medium.users) {
    if (goesBefore(priority, best)) best = priority;
  }
  if (medium.told && !goesBefore(best, *medium.told) && !goesBefore(*medium.told, best)) return;
  if (!medium.told) ++medium.wish;
  medium.told = best;
  if (medium.arbiter) {
    medium.wishes[self_] = medium.wish;
    carryOut(medium, medium.arbiter->want(self_, best, now_s), now_s);
  } else {
    send(medium, FrameType::kWant, medium.arbiter_rank, medium.wish, best);
  }
}

void Media::giveBack(Medium& medium, double now_s) {
  if (!medium.told) return;
  medium.is_held = false;
  medium.told.reset();
  if (medium.arbiter) {
    carryOut(medium, medium.arbiter->giveBack(self_, now_s), now_s);
  } else {
    send(medium, FrameType::kReturn, medium.arbiter_rank, medium.wish, {});
  }
}

// ------------------------------------------------------------ messages

void Media::send(const Medium& medium, FrameType type, std::uint32_t rank, std::uint64_t wish,
                 Priority priority) {
  FrameHeader header;
  header.type = type;
  header.traffic_class = priority.traffic_class;
  header.group = medium.number;
  header.seq = wish;
  std::memcpy(&header.total, &priority.deadline, sizeof header.total);
  send_(rank, header);
}

void Media::onFrame(std::uint32_t rank, const FrameHeader& header, double now_s) {
  auto found = media_.find(header.group);
  if (found == media_.end()) return;  // this rank was told of no such medium
  Medium& medium = found->second;
  if (header.type == FrameType::kAllow || header.type == FrameType::kRevoke) {
    bool is_allowed = header.type == FrameType::kAllow;
    if (rank == medium.arbiter_rank) {
      obey(medium, is_allowed ? Arbiter::Kind::kAllow : Arbiter::Kind::kRevoke, header.seq, now_s);
    }
    return;
  }
  if (!medium.arbiter) return;  // asked the wrong rank: it will go without
  if (header.type == FrameType::kReturn) {
    if (medium.arbiter->holder() == rank) medium.revoked_s.reset();
    carryOut(medium, medium.arbiter->giveBack(rank, now_s), now_s);
    return;
  }
  Priority priority{header.traffic_class, 0};
  std::memcpy(&priority.deadline, &header.total, sizeof header.total);
  if (std::isnan(priority.deadline)) throw ProtocolError("want: given no number as deadline");
  medium.wishes[rank] = header.seq;
  carryOut(medium, medium.arbiter->want(rank, priority, now_s), now_s);
}

// What the arbiter says to this rank.
void Media::obey(Medium& medium, Arbiter::Kind kind, std::uint64_t wish, double now_s) {
  if (!medium.told || wish != medium.wish) return;  // crossed with this rank's return
  if (kind == Arbiter::Kind::kAllow) {
    medium.is_held = true;
    has_freed_ = true;
    return;
  }
  giveBack(medium, now_s);
  if (!medium.users.empty()) tell(medium, now_s);
  has_freed_ = true;  // the media behind it, which its users may hold
}

// What this rank as the arbiter has decided.
void Media::carryOut(Medium& medium, const std::vector<Arbiter::Order>& orders, double now_s) {
  for (const Arbiter::Order& order : orders) {
    bool is_allowed = order.kind == Arbiter::Kind::kAllow;
    medium.revoked_s = is_allowed ? std::nullopt : std::optional(now_s);
    std::uint64_t wish = medium.wishes[order.rank];
    if (order.rank == self_) {
      obey(medium, order.kind, wish, now_s);
    } else {
      send(medium, is_allowed ? FrameType::kAllow : FrameType::kRevoke, order.rank, wish, {});
    }
  }
}

bool Media::onLost(std::uint32_t rank, double now_s) {
  bool is_affected = false;
  for (auto& [number, medium] : media_) {
    if (medium.users.erase(rank) > 0 && medium.users.empty()) giveBack(medium, now_s);
    if (medium.arbiter) {
      carryOut(medium, medium.arbiter->giveBack(rank, now_s), now_s);
    } else if (medium.arbiter_rank == rank && !medium.is_free) {
      medium.is_free = true;
      is_affected = has_freed_ = true;
    }
  }
  return is_affected;
}

void Media::tick(double now_s) {
  for (auto& [number, medium] : media_) {
    if (!medium.arbiter) continue;
    carryOut(medium, medium.arbiter->tick(now_s), now_s);
    if (medium.revoked_s && now_s - *medium.revoked_s > kReturnLimitS && medium.arbiter->holder()) {
      medium.revoked_s.reset();
      carryOut(medium, medium.arbiter->giveBack(*medium.arbiter->holder(), now_s), now_s);
    }
  }
}

bool Media::takeFreed() {
  bool has_freed = has_freed_;
  has_freed_ = false;
  return has_freed;
}

}  // namespace dora
