// This rank's use of shared media: asks the arbiters, obeys them, and is one where told to.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "arbiter.h"
#include "frame.h"

namespace dora {

struct MediaOptions {
  std::map<std::uint32_t, std::vector<std::uint32_t>> media;  // peer -> media that bulk crosses
  std::map<std::uint32_t, std::uint32_t> arbiters;            // medium -> rank that lends it
};

// Bulk crosses a shared medium only while this rank holds it. Media are borrowed in ascending
// order, so that ranks which need several can not block each other. A medium whose arbiter is lost
// is used freely: then only the local order counts.
//
// Thread safety: none; whoever holds the engine's state.
class Media {
 public:
  using Send = std::function<void(std::uint32_t rank, const FrameHeader&)>;

  Media(std::uint32_t self, double aging_s, Send send);

  void configure(const MediaOptions& options);
  bool isEmpty() const { return media_.empty(); }

  // May bulk of this priority go to `peer` now? Asks for what is missing; `takeFreed` tells later.
  bool mayUse(std::uint32_t peer, Priority priority, double now_s);
  // No bulk to `peer` waits any more.
  void done(std::uint32_t peer, double now_s);

  // kWant, kAllow, kRevoke, kReturn. Throws ProtocolError.
  void onFrame(std::uint32_t rank, const FrameHeader& header, double now_s);
  // Returns true if it lent a medium that this rank uses.
  bool onLost(std::uint32_t rank, double now_s);
  void tick(double now_s);

  // True once after something was lent or became free: peers should be tried again.
  bool takeFreed();

 private:
  struct Medium {
    std::uint32_t number = 0;
    std::uint32_t arbiter_rank = 0;
    bool is_free = false;  // the arbiter is lost
    std::map<std::uint32_t, Priority> users;  // peers that bulk waits for
    std::optional<Priority> told;
    std::uint64_t wish = 0;  // number of the latest; an answer to an older one is void
    bool is_held = false;
    // Only on the rank that lends it:
    std::unique_ptr<Arbiter> arbiter;
    std::map<std::uint32_t, std::uint64_t> wishes;
    std::optional<double> revoked_s;
  };

  void tell(Medium& medium, double now_s);
  void giveBack(Medium& medium, double now_s);
  void leave(Medium& medium, std::uint32_t peer, double now_s);  // no bulk to `peer` waits for it
  void obey(Medium& medium, Arbiter::Kind kind, std::uint64_t wish, double now_s);
  void carryOut(Medium& medium, const std::vector<Arbiter::Order>& orders, double now_s);
  void send(const Medium& medium, FrameType type, std::uint32_t rank, std::uint64_t wish,
            Priority priority);

  std::uint32_t self_;
  double aging_s_;
  Send send_;
  std::map<std::uint32_t, Medium> media_;
  std::map<std::uint32_t, std::vector<std::uint32_t>> of_peer_;
  bool has_freed_ = false;
};

}  // namespace dora
