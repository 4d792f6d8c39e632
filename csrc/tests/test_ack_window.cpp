#include "ack_window.h"

#include <deque>
#include <random>

#include "check.h"
#include "rate.h"
#include "send_queue.h"

namespace dora {
namespace {

// A lane as the engine runs it: messages of random sizes, a link that changes, late answers.
class Lane {
 public:
  explicit Lane(unsigned seed) : random_(seed) {}

  void step() {
    if (draw(8) == 0) post();
    if (draw(8) == 0) chunk_bytes_ = kMinChunkBytes << draw(7);
    if (draw(3) == 0) acknowledge();
    if (draw(16) == 0) fit();
    if (draw(2) == 0) send();
    checkMoves();
  }

  std::uint64_t sentBytes() const { return sent_bytes_; }

 private:
  std::uint64_t draw(std::uint64_t below) { return random_() % below; }

  void post() {
    for (std::uint64_t count = draw(40), bytes = 1ull << draw(22); count > 0; --count) {
      queue_.post(++posts_, draw(bytes), {}, 0);
    }
  }

  bool send() {
    auto chunk = queue_.next(0, chunk_bytes_);
    if (!chunk) return false;
    sent_bytes_ += chunk->num_bytes;
    if (window_.onChunk(chunk->num_bytes, chunk_bytes_, queue_.size() == 0)) {
      asked_.push_back(sent_bytes_);
    }
    return true;
  }

  void acknowledge() {
    if (asked_.empty()) return;
    queue_.acknowledge(asked_.front() - acked_bytes_);
    acked_bytes_ = asked_.front();
    asked_.pop_front();
    fit();
  }

  void fit() { queue_.setCredit(window_.fit(chunk_bytes_, draw(2) << draw(24))); }

  void checkMoves() {
    if (queue_.size() > 0 && asked_.empty()) CHECK(send());
  }

  std::mt19937 random_;
  SendQueue queue_{1, AckWindow::kMinCreditBytes};
  AckWindow window_;
  std::deque<std::uint64_t> asked_;  // bytes sent up to each chunk that asked and has no answer
  std::uint64_t posts_ = 0;
  std::uint64_t chunk_bytes_ = 64 * 1024;
  std::uint64_t sent_bytes_ = 0;
  std::uint64_t acked_bytes_ = 0;
};

void testNeverStandsStill() {
  std::uint64_t sent_bytes = 0;
  for (unsigned seed = 0; seed < 300; ++seed) {
    Lane lane(seed);
    for (int i = 0; i < 2000; ++i) lane.step();
    sent_bytes += lane.sentBytes();
  }
  CHECK(sent_bytes > 0);
}

void testRoomForWhatNobodyHasAskedAbout() {
  AckWindow window;
  window.fit(kMaxChunkBytes, 0);
  CHECK(!window.onChunk(kMaxChunkBytes - 1, kMaxChunkBytes, false));
  CHECK(window.fit(kMinChunkBytes, 0) == kMaxChunkBytes);  // not less, on a link that slowed down
  CHECK(window.onChunk(1, kMinChunkBytes, false));
  CHECK(window.fit(kMinChunkBytes, 0) == AckWindow::kMinCreditBytes);
}

void testLastChunkAsks() {
  AckWindow window;
  CHECK(!window.onChunk(1, kMinChunkBytes, false));
  CHECK(window.onChunk(1, kMinChunkBytes, true));
}

}  // namespace
}  // namespace dora

int main() {
  dora::testNeverStandsStill();
  dora::testRoomForWhatNobodyHasAskedAbout();
  dora::testLastChunkAsks();
}
