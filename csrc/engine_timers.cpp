// When the engine wakes up, and which operations have waited for too long.
#include <algorithm>
#include <cstdio>

#include "engine.h"

namespace dora {

namespace {

bool isLater(const std::pair<double, std::weak_ptr<Transfer>>& a,
             const std::pair<double, std::weak_ptr<Transfer>>& b) {
  return a.first > b.first;
}

}  // namespace

double Engine::nextWakeS() const {
  bool is_busy = std::any_of(peers_.begin(), peers_.end(), [](const auto& entry) {
    return entry.second->outbox.queue(Lanes::kBulkLane).size() > 0;
  });
  double wait_s = is_busy ? kBusyTickS : kTickS;
  if (!timers_.empty()) wait_s = std::min(wait_s, timers_.front().first - nowS());
  if (buckets_) {
    double now_s = nowS();
    for (const auto& [rank, peer] : peers_) wait_s = std::min(wait_s, peer->wakeS(now_s) - now_s);
  }
  return std::max(0.0, wait_s);
}

void Engine::addTimer(double time_s, const TransferPtr& transfer) {
  if (timers_.size() >= max_timers_) {
    auto isOver = [](const Timer& timer) {
      TransferPtr other = timer.second.lock();
      return !other || other->isDone();
    };
    timers_.erase(std::remove_if(timers_.begin(), timers_.end(), isOver), timers_.end());
    std::make_heap(timers_.begin(), timers_.end(), isLater);
    max_timers_ = std::max<std::size_t>(1024, 2 * timers_.size());
  }
  timers_.emplace_back(time_s, transfer);
  std::push_heap(timers_.begin(), timers_.end(), isLater);
}

void Engine::expire(double now_s) {
  while (!timers_.empty() && timers_.front().first <= now_s) {
    std::pop_heap(timers_.begin(), timers_.end(), isLater);
    TransferPtr transfer = timers_.back().second.lock();
    timers_.pop_back();
    if (!transfer || transfer->isDone()) continue;
    char reason[64];
    std::snprintf(reason, sizeof reason, "no answer within %g s", transfer->timeout_s);
    endTransfer(*transfer, Outcome::kTimedOut, reason);
  }
}

}  // namespace dora
