#include "gate.h"

#include <algorithm>
#include <limits>
#include <tuple>

namespace dora {

Gate::Gate(std::shared_ptr<Buckets> buckets, std::uint32_t self, std::uint32_t peer)
    : buckets_(std::move(buckets)), path_(buckets_->path(self, peer)) {}

void Gate::begin(int lane, std::uint64_t num_bytes, double now_s) {
  Turn& turn = turns_[static_cast<std::size_t>(lane)];
  double since_s = std::clamp(turn.since_s.value_or(now_s), now_s - kLatestS, now_s);
  turn.booking.parts.clear();
  if (num_bytes > 0) buckets_->book(path_, num_bytes, since_s, turn.booking);
  turn.num_bytes = num_bytes;
  turn.begin_s = turn.end_s = now_s;
}

bool Gate::isOpen(int lane, double now_s) {
  Turn& turn = turns_[static_cast<std::size_t>(lane)];
  if (turn.booking.parts.empty()) return !isDown();
  std::tie(turn.end_s, turn.begin_s) = buckets_->passes(turn.booking);
  return turn.end_s <= now_s && !isDown();
}

double Gate::end(int lane) {
  Turn& turn = turns_[static_cast<std::size_t>(lane)];
  buckets_->onSent(path_, turn.num_bytes);
  turn.num_bytes = 0;
  turn.since_s = turn.end_s;
  return turn.begin_s;
}

double Gate::wakeS(int lane, double now_s) const {
  if (isDown()) return now_s + kLookS;
  const Turn& turn = turns_[static_cast<std::size_t>(lane)];
  if (turn.num_bytes == 0) return std::numeric_limits<double>::infinity();
  return std::min(turn.end_s, now_s + kLookS);
}

}  // namespace dora
