#include "send_queue.h"

#include <limits>
#include <stdexcept>
#include <vector>

#include "check.h"

namespace dora {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr std::uint64_t kUnlimited = 1ull << 60;

std::vector<std::uint64_t> drain(SendQueue& queue, double now_s = 0) {
  std::vector<std::uint64_t> ids;
  while (const auto chunk = queue.next(now_s, 100)) ids.push_back(chunk->id);
  return ids;
}

void testOrder() {
  SendQueue queue(kNever, kUnlimited);
  queue.post(1, 1, {kWeights, 0}, 0);
  queue.post(2, 1, {kActivation, 2}, 0);
  queue.post(3, 1, {kActivation, 1}, 0);
  queue.post(4, 1, {kActivation, 1}, 0);
  queue.post(5, 1, {kControl, 9}, 0);
  queue.post(6, 1, {kUrgent, 0}, 0, false);
  CHECK((drain(queue) == std::vector<std::uint64_t>{5, 3, 4, 2, 1}));
  CHECK(!queue.head(0));
  CHECK(queue.setReady(6));
  CHECK(queue.head(0)->traffic_class == kUrgent);
  CHECK((drain(queue) == std::vector<std::uint64_t>{6}));
}

void testChunksTile() {
  for (const std::uint64_t size : {0, 1, 99, 100, 101, 1003}) {
    SendQueue queue(1, kUnlimited);
    queue.post(1, size, {}, 0);
    std::uint64_t end = 0;
    bool is_last = false;
    while (const auto chunk = queue.next(0, 100)) {
      CHECK(!is_last);
      CHECK(chunk->offset == end);
      end += chunk->num_bytes;
      is_last = chunk->is_last;
    }
    CHECK(is_last && end == size && queue.outstanding() == size && queue.size() == 0);
  }
}

void testCredit() {
  SendQueue queue(1, 100);
  queue.post(1, 200, {kActivation, 0}, 0);
  queue.post(2, 1, {kGradient, 0}, 0);
  CHECK(queue.next(0, 100)->id == 1);
  CHECK(!queue.next(0, 100));
  CHECK(queue.head(0)->traffic_class == kActivation);
  queue.acknowledge(1);
  CHECK(queue.next(0, 100)->is_last);
  queue.acknowledge(kUnlimited);
  CHECK(queue.outstanding() == 0);
}

void testAging() {
  SendQueue queue(1, kUnlimited);
  queue.post(1, 1, {kWeights, 0}, 0);
  CHECK(queue.head(0.9)->traffic_class == kWeights);
  CHECK(queue.head(1.5)->traffic_class == kGradient);
  CHECK(queue.head(2.4)->traffic_class == kGradient);  // the clock restarted at 1.5
  CHECK(queue.head(2.5)->traffic_class == kActivation);
  CHECK(queue.head(1e9)->traffic_class == kActivation);
}

void testStats() {
  SendQueue queue(1, kUnlimited);
  queue.post(1, 200, {kWeights, 0}, 0);
  queue.next(0.5, 100);
  queue.post(2, 10, {kUrgent, 0}, 0.5);
  queue.next(0.75, 100);
  queue.next(5, 100);
  const QueueStats& stats = queue.stats();
  CHECK(stats.preemptions == 1);
  CHECK(stats.messages[kWeights] == 1 && stats.messages[kUrgent] == 1);
  CHECK(stats.bytes[kWeights] == 200 && stats.bytes[kUrgent] == 10);
  CHECK(stats.queue_s[kWeights] == 0.5 && stats.queue_s[kUrgent] == 0.25);
}

void testRefusals() {
  SendQueue queue(1, kUnlimited);
  queue.post(1, 1, {}, 0);
  CHECK_THROWS(queue.post(1, 1, {}, 0), std::invalid_argument);
  CHECK_THROWS(queue.post(2, 1, {kNumClasses, 0}, 0), std::invalid_argument);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS(queue.reprioritise(1, {kUrgent, nan}), std::invalid_argument);
  CHECK_THROWS(queue.next(0, 0), std::invalid_argument);
  CHECK_THROWS(SendQueue(0, 1), std::invalid_argument);
  CHECK(queue.cancel(1) && !queue.cancel(1) && !queue.setReady(1) && !queue.reprioritise(1, {}));
}

}  // namespace
}  // namespace dora

int main() {
  dora::testOrder();
  dora::testChunksTile();
  dora::testCredit();
  dora::testAging();
  dora::testStats();
  dora::testRefusals();
}
