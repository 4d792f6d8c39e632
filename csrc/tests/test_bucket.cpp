#include "bucket.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "gate.h"

namespace dora {
namespace {

// A file of media that ends with the test.
class File {
 public:
  explicit File(const BucketTable& table, double now_s = 0) {
    char path[] = "/tmp/dora-bucket-XXXXXX";
    ::close(::mkstemp(path));
    path_ = path;
    Buckets::create(path_, table, now_s);
  }
  ~File() { ::unlink(path_.c_str()); }
  std::shared_ptr<Buckets> open() const { return std::make_shared<Buckets>(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

BucketTable oneMedium(double rate) { return {2, {rate}, {{{0, 1}, {0}}, {{1, 0}, {0}}}}; }

bool isNear(double a, double b) { return std::abs(a - b) <= 1e-9 * std::max(1.0, std::abs(b)); }

double passS(Buckets& buckets, const Path& path, std::uint64_t num_bytes, double since_s) {
  Booking booking;
  buckets.book(path, num_bytes, since_s, booking);
  return buckets.passes(booking).first;
}

void testBytesTakeTheirTime() {
  File file(oneMedium(1000));
  auto buckets = file.open();
  Path path = buckets->path(0, 1);
  CHECK(isNear(passS(*buckets, path, 500, 10), 10.5));
  CHECK(isNear(passS(*buckets, path, 500, 10), 11));     // behind the first
  CHECK(isNear(passS(*buckets, path, 500, 10.9), 11.5));
  CHECK(isNear(passS(*buckets, path, 500, 20), 20.5));   // idle time is not saved up
  CHECK(isNear(passS(*buckets, path, 0, 20), 20.5));
}

void testCrossingTwiceTakesTwice() {
  File file({3, {1000, 100}, {{{0, 1}, {0, 0}}, {{0, 2}, {0, 1, 0}}}});
  auto buckets = file.open();
  CHECK(isNear(passS(*buckets, buckets->path(0, 1), 500, 1), 2));
  CHECK(isNear(passS(*buckets, buckets->path(0, 2), 500, 10), 15));  // the slower one decides
  CHECK(isNear(passS(*buckets, buckets->path(0, 1), 500, 10), 12));
  CHECK(passS(*buckets, buckets->path(1, 2), 500, 3) <= 3);  // no limit
  buckets->onSent(buckets->path(0, 2), 7);
  buckets->onReceived(2, 7);
  CHECK(buckets->carriedBytes(0) == 14 && buckets->carriedBytes(1) == 7);
  CHECK(buckets->sentBytes(0) == 7 && buckets->receivedBytes(2) == 7);
  CHECK(buckets->sentBytes(2) == 0);
}

void testChangedRateHoldsForWhatIsBooked() {
  File file(oneMedium(1000));
  auto buckets = file.open(), owner = file.open();
  Path path = buckets->path(0, 1);
  Booking booking;
  buckets->book(path, 1000, 0, booking);
  owner->setRate(0, 250, 0.5);
  CHECK(isNear(buckets->passes(booking).first, 2.5));
  owner->setRate(0, 0, 1.5);
  CHECK(std::isinf(buckets->passes(booking).first));
  CHECK(buckets->isDown(path));
  owner->setRate(0, 500, 100);
  CHECK(isNear(buckets->passes(booking).first, 100.5));
  CHECK(!buckets->isDown(path) && owner->rate(0) == 500);
}

// Many threads book and one changes rates: no byte is booked twice or lost, no rate is torn.
void testThreadsShare() {
  constexpr int kThreads = 4, kBookings = 5000;
  File file(oneMedium(8));
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      auto buckets = file.open();
      Path path = buckets->path(0, 1);
      for (int j = 0; j < kBookings; ++j) {
        (void)passS(*buckets, path, 3, 0);
        double rate = buckets->rate(0);
        CHECK(rate == 8 || rate == 16);
      }
    });
  }
  auto owner = file.open();
  for (int i = 0; i < 2000; ++i) owner->setRate(0, i % 2 ? 8 : 16, 0);
  for (std::thread& thread : threads) thread.join();
  owner->setRate(0, 1, 0);
  CHECK(isNear(passS(*owner, owner->path(0, 1), 0, 0), 3.0 * kThreads * kBookings));
}

void testKilledProcessLeavesTheMediumUsable() {
  File file(oneMedium(1e6));
  for (int i = 0; i < 10; ++i) {
    pid_t child = ::fork();
    if (child == 0) {
      auto buckets = file.open();
      Path path = buckets->path(0, 1);
      while (true) (void)passS(*buckets, path, 1, 0);
    }
    ::usleep(2000);
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
  }
  auto buckets = file.open();
  double before_s = passS(*buckets, buckets->path(0, 1), 0, 0);
  CHECK(isNear(passS(*buckets, buckets->path(0, 1), 1000000, 0), before_s + 1));
}

void testBadFilesAndNumbersAreRefused() {
  File file(oneMedium(1000));
  auto buckets = file.open();
  CHECK_THROWS(Buckets(file.path() + "-none"), std::invalid_argument);
  CHECK_THROWS(Buckets("/proc/self/status"), std::invalid_argument);
  CHECK_THROWS(buckets->setRate(0, -1, 0), std::invalid_argument);
  CHECK_THROWS(buckets->setRate(0, std::numeric_limits<double>::quiet_NaN(), 0),
               std::invalid_argument);
  CHECK_THROWS(buckets->setRate(1, 1, 0), std::invalid_argument);
  CHECK_THROWS(buckets->path(0, 2), std::invalid_argument);
  CHECK_THROWS(Buckets::create(file.path(), {1, {1}, {{{0, 1}, {0}}}}, 0), std::invalid_argument);
  CHECK_THROWS(Buckets::create(file.path(), {2, {1}, {{{0, 1}, {1}}}}, 0), std::invalid_argument);
}

// ------------------------------------------------------------ Gate

// Sends chunks of 10 bytes, waking up so late each time; returns when the last one has left.
double sendLate(Gate& gate, double now_s, double late_s, int count) {
  for (int i = 0; i < count; ++i) {
    gate.begin(1, 10, now_s);
    if (!gate.isOpen(1, now_s)) now_s = gate.wakeS(1, now_s) + late_s;
    CHECK(gate.isOpen(1, now_s));
    gate.end(1);
  }
  return now_s;
}

void testLateSenderKeepsTheRate() {
  File file(oneMedium(1000));
  Gate gate(file.open(), 0, 1);
  CHECK(std::abs(sendLate(gate, 5, 0.003, 1000) - 15) < 0.004);
}

void testStoppedSenderCatchesUpALittle() {
  File file(oneMedium(1000));
  Gate gate(file.open(), 0, 1);
  gate.begin(1, 10, 5);
  CHECK(gate.isOpen(1, 9));  // was stopped
  gate.end(1);
  CHECK(isNear(sendLate(gate, 9, 0, 5), 9));  // 50 ms
  CHECK(isNear(sendLate(gate, 9, 0, 1), 9.01));
  gate.rest(1);
  CHECK(isNear(sendLate(gate, 20, 0, 1), 20.01));  // had nothing to send: no catching up
}

void testUrgentWaitsForOneChunk() {
  File file(oneMedium(1000));
  Gate gate(file.open(), 0, 1);
  gate.begin(1, 100, 1);
  gate.begin(0, 10, 1.05);
  CHECK(!gate.isOpen(0, 1.1) && gate.isOpen(1, 1.1));
  CHECK(isNear(gate.end(1), 1));
  gate.begin(1, 100, 1.1);
  CHECK(gate.isOpen(0, 1.11) && !gate.isOpen(1, 1.2));
  CHECK(isNear(gate.end(0), 1.1));
  CHECK(gate.isOpen(1, 1.21) && isNear(gate.end(1), 1.11));
}

void testGateSaysWhenToAskAgain() {
  File file(oneMedium(1000));
  Gate gate(file.open(), 0, 1);
  CHECK(std::isinf(gate.wakeS(1, 1)));
  gate.begin(1, 100, 1);
  CHECK(!gate.isOpen(1, 1) && std::isinf(gate.wakeS(0, 1)));
  CHECK(isNear(gate.wakeS(1, 1), 1 + Gate::kLookS));  // the rate may change
  CHECK(isNear(gate.wakeS(1, 1.095), 1.1));
}

void testNothingPassesWhatIsDown() {
  File file({2, {1000}, {{{0, 1}, {0}}}});
  auto owner = file.open();
  Gate there(file.open(), 0, 1), back(file.open(), 1, 0);
  owner->setRate(0, 0, 0);
  there.begin(1, 10, 1);
  back.begin(1, 10, 1);
  CHECK(there.isDown() && !there.isOpen(1, 5) && isNear(there.wakeS(1, 5), 5 + Gate::kLookS));
  CHECK(!back.isDown() && back.isOpen(1, 1));  // crosses no medium
  owner->setRate(0, 1000, 6);
  CHECK(!there.isOpen(1, 6.005) && there.isOpen(1, 6.01));
  for (std::uint32_t end : {0, 1}) {
    owner->setConnected(end, false);
    CHECK(there.isDown() && back.isDown() && !there.isOpen(1, 7) && !back.isOpen(1, 7));
    owner->setConnected(end, true);
    CHECK(there.isOpen(1, 7) && back.isOpen(1, 7));
  }
}

}  // namespace
}  // namespace dora

int main() {
  dora::testBytesTakeTheirTime();
  dora::testCrossingTwiceTakesTwice();
  dora::testChangedRateHoldsForWhatIsBooked();
  dora::testThreadsShare();
  dora::testKilledProcessLeavesTheMediumUsable();
  dora::testBadFilesAndNumbersAreRefused();
  dora::testLateSenderKeepsTheRate();
  dora::testStoppedSenderCatchesUpALittle();
  dora::testUrgentWaitsForOneChunk();
  dora::testGateSaysWhenToAskAgain();
  dora::testNothingPassesWhatIsDown();
}
