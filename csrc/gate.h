// What one peer is sent, held back as long as the media of an emulated network would need for it.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>

#include "bucket.h"

namespace dora {

// A peer's way through emulated media.
//
// A lane books the media for a chunk when it takes it off the queue; the payload leaves when it
// would have passed, so what arrives has taken as long as on such a network, and an urgent message
// waits for the chunks that are booked already, one per lane of each sender. Only payloads are
// booked, since rates are goodputs; other frames and empty messages pass at once. Nothing passes a
// medium that is down.
// Thread safety: none; whoever holds the engine's state.
class Gate {
 public:
  // While a lane waits, a medium may change: it is looked at again after so long.
  static constexpr double kLookS = 0.01;

  // A sender that was stopped or kept from the processor may catch up with so much of what a
  // network card would have sent meanwhile. At a fifth of a core in periods of 20 ms it stands
  // still for 16 ms.
  static constexpr double kLatestS = 0.05;

  Gate(std::shared_ptr<Buckets> buckets, std::uint32_t self, std::uint32_t peer);

  // A lane begins a chunk. One that has not rested could have done so when the last one had passed.
  void begin(int lane, std::uint64_t num_bytes, double now_s);
  // May its payload leave?
  bool isOpen(int lane, double now_s);
  // It has left; returns since when it was passing the slowest medium.
  double end(int lane);
  // The lane has nothing to send, or something else holds it back.
  void rest(int lane) { turns_[static_cast<std::size_t>(lane)].since_s.reset(); }

  void onReceived(std::uint64_t num_bytes) { buckets_->onReceived(path_.src, num_bytes); }
  void onJoined() { buckets_->onJoined(path_.src); }

  bool isDown() const { return buckets_->isDown(path_); }
  // When to ask again for a lane: infinite if it does not wait.
  double wakeS(int lane, double now_s) const;

 private:
  struct Turn {
    Booking booking;
    std::uint64_t num_bytes = 0;  // 0: no chunk is under way
    double begin_s = 0, end_s = 0;
    std::optional<double> since_s;  // since when the next chunk could have begun
  };

  std::shared_ptr<Buckets> buckets_;
  Path path_;
  std::array<Turn, 2> turns_;
};

}  // namespace dora
