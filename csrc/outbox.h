// What this rank sends to one peer: queues, credit, and the peer's grants.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>

#include "ack_window.h"
#include "rate.h"
#include "transfer.h"

namespace dora {

// Sends to one peer.
//
// A message leaves when the peer has granted it, or, before any grant, while it fits the eager
// credit; otherwise it asks and waits. A large eager message gets its credit back with the grant
// that the peer sends for every large receive, a small one through kCredit frames.
// Thread safety: none; whoever holds the engine's state.
class Outbox {
 public:
  Outbox(const EngineOptions& options, Lanes& lanes);

  void post(const TransferPtr& transfer, double now_s);
  void reprioritise(Transfer& transfer, Priority priority);
  // Fails a send here and at the peer; the memory is free when this returns.
  void cancel(Transfer& transfer, Outcome outcome, const std::string& reason);
  void failAll(Outcome outcome, const std::string& reason);

  void onGrant(const FrameHeader& header);
  void onCredit(const FrameHeader& header);
  void onAck(const FrameHeader& header, double now_s);
  void onCancel(const FrameHeader& header, const std::string& reason);

  // Starts the next data frame of that lane, if one may leave now.
  void fill(Connection& connection, int lane, double now_s);
  void onDataSent(int lane);
  // Bulk has to wait for a shared medium: what is outstanding now says nothing about the rate.
  void pause() { estimator_.onIdle(); }

  // The bulk message that would go next.
  std::optional<Priority> bulkHead(double now_s) { return bulk().head(now_s); }
  bool isIdle() const { return sends_.empty(); }

  // Adapts pace, chunk and credit to the measured rate.
  void adapt(double now_s);
  // The path's rate is known: nothing is measured.
  void setKnownRate(double bytes_per_s) { known_rate_ = bytes_per_s; }
  std::optional<double> rateBytesPerS() const;
  const RateEstimator& estimator() const { return estimator_; }
  std::uint64_t chunkBytes() const;
  // How much may wait unsent in the kernel at such a rate.
  std::size_t unsentLimit(double rate_bytes_per_s) const;

  const SendQueue& queue(int lane) const { return queues_[static_cast<std::size_t>(lane)]; }
  std::uint64_t bytesSent() const { return bytes_sent_; }

 private:
  struct Send {
    TransferPtr transfer;
    int lane;
    bool is_eager;
    bool is_started = false;
  };

  SendQueue& bulk() { return queues_[Lanes::kBulkLane]; }
  void finish(std::unordered_map<std::uint64_t, Send>::iterator send);
  void end(std::unordered_map<std::uint64_t, Send>::iterator send, Outcome outcome,
           const std::string& reason);
  bool isLeaving(const Send& send) const;
  void drop(const Send& send);
  void release(const Send& send);

  const EngineOptions& options_;
  Lanes& lanes_;
  std::array<SendQueue, 2> queues_;
  PostCounter counter_;
  std::unordered_map<std::uint64_t, Send> sends_;  // by operation
  KeyMap<std::uint64_t> ids_;                      // of unfinished sends
  KeyMap<std::uint64_t> grants_;                   // came before the send: its bytes
  KeyMap<std::string> refusals_;                   // came before the send: why
  KeyMap<std::uint64_t> eager_;                    // large, left early: charge until the grant
  std::uint64_t charged_bytes_ = 0;
  std::array<std::uint64_t, 2> last_chunk_of_{};   // operation whose last chunk is being sent
  std::uint64_t bytes_sent_ = 0;                   // on the bulk lane
  std::uint64_t acked_bytes_ = 0;
  AckWindow window_;                               // of the bulk lane
  RateEstimator estimator_;
  double known_rate_ = 0;
  double applied_pace_ = 0;
  std::size_t applied_limit_ = 0;
  std::size_t segment_bytes_ = 0;
  std::uint8_t marked_class_ = kNumClasses;
};

}  // namespace dora
