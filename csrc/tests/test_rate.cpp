#include "rate.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <utility>

#include "check.h"

namespace dora {
namespace {

constexpr double kRttS = 0.002;
constexpr double kBufferBytes = 64 * 1024;

// A sender that obeys the pace, a link with a small buffer, and a receiver that acknowledges.
class Link {
 public:
  explicit Link(double rate) : rate_(rate) {}

  void run(double seconds) {
    const double until_s = now_s_ + seconds;
    while (now_s_ < until_s) send();
  }

  void setRate(double rate) { rate_ = rate; }
  double sent() const { return static_cast<double>(sent_bytes_); }
  const RateEstimator& estimator() const { return estimator_; }
  bool isNear(double rate) const { return std::abs(*estimator_.rateBytesPerS() / rate - 1) < 0.03; }

 private:
  void send() {
    while (!acks_.empty() && acks_.front().first <= now_s_) {
      estimator_.onAck(acks_.front().second, acks_.front().first);
      acks_.pop_front();
    }
    const std::uint64_t num_bytes = estimator_.chunkBytes();
    const double size = static_cast<double>(num_bytes);
    sent_bytes_ += num_bytes;
    estimator_.onSent(sent_bytes_, now_s_);
    const double pace = estimator_.paceBytesPerS(now_s_);
    const double paced_s = pace > 0 ? now_s_ + size / pace : now_s_;
    free_s_ = std::max(std::max(free_s_, now_s_) + size / rate_, paced_s);
    acks_.emplace_back(free_s_ + kRttS, sent_bytes_);
    now_s_ = std::max(paced_s, free_s_ - kBufferBytes / rate_);
  }

  RateEstimator estimator_;
  double rate_;
  double now_s_ = 0;
  double free_s_ = 0;
  std::uint64_t sent_bytes_ = 0;
  std::deque<std::pair<double, std::uint64_t>> acks_;  // time, cumulative bytes
};

void testLinkIsFollowed(double rate) {
  Link link(rate);
  link.run(0.2);
  CHECK(link.isNear(rate));
  CHECK(*link.estimator().minRttS() >= kRttS);
  link.setRate(0.3 * rate);
  link.run(3);
  CHECK(link.isNear(0.3 * rate));
  link.setRate(0.9 * rate);
  link.run(5);
  CHECK(link.isNear(0.9 * rate));
  const double before = link.sent();
  link.run(10);
  CHECK(link.sent() - before >= 0.98 * 10 * 0.9 * rate);
}

void testUnknown() {
  const RateEstimator estimator;
  CHECK(!estimator.rateBytesPerS() && !estimator.minRttS());
  CHECK(estimator.chunkBytes() == 64 * 1024);
  CHECK(estimator.paceBytesPerS(1) == 0);
}

void testChunkOf100Mbit() {
  Link link(12.5e6);
  link.run(1);
  CHECK(link.estimator().chunkBytes() == 24 * 1024);
}

}  // namespace
}  // namespace dora

int main() {
  dora::testUnknown();
  dora::testChunkOf100Mbit();
  for (const double rate : {2.5e6, 12.5e6, 117e6, 237e6}) dora::testLinkIsFollowed(rate);
}
