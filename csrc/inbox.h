// What one peer sends to this rank: matching, memory for data that nobody expects yet, grants.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <unordered_set>
#include <vector>

#include "transfer.h"

namespace dora {

// Receives from one peer.
//
// A message is known by (group, tag, seq) on both sides before any byte moves, so data may arrive
// in any order. Data of a posted receive goes straight into its memory; other data is stored, never
// more than the eager credit. Every large receive is granted once, when it is posted; a small one
// only if the peer asks.
// Thread safety: none; whoever holds the engine's state.
class Inbox {
 public:
  Inbox(const EngineOptions& options, Lanes& lanes);

  void post(const TransferPtr& transfer);
  void cancel(Transfer& transfer, Outcome outcome, const std::string& reason);
  // The peer is lost. What has arrived whole stays for receives that are posted later.
  void failAll(Outcome outcome, const std::string& reason);
  // After failAll: whether the next receive of `key` finds its message.
  bool hasWhole(const MessageKey& key) const;

  std::uint8_t* onHeader(const FrameHeader& header);
  // Returns true if this frame began a message that nobody has posted a receive for.
  bool onData(const FrameHeader& header, const std::uint8_t* payload, bool is_intact);
  bool onRequest(const FrameHeader& header);  // as onData
  void onCancel(const FrameHeader& header, const std::string& reason);
  void onBulkData(const FrameHeader& header);  // counts, acknowledges

  // The next message with that group and tag has begun to arrive and waits for a receive.
  bool hasNext(std::uint32_t group, std::int32_t tag) const;
  bool isNext(const MessageKey& key) const { return counter_.isNext(key); }
  bool isIdle() const { return num_posted_ == 0; }

  std::uint64_t unexpectedBytes() const { return charged_bytes_; }
  std::uint64_t corruptFrames() const { return corrupt_frames_; }
  std::uint64_t bytesReceived() const { return bytes_received_; }

 private:
  struct Message {
    TransferPtr transfer;               // null while nobody has posted a receive
    std::uint64_t total = 0;
    std::uint64_t received = 0;
    std::vector<std::uint8_t> stored;   // arrived before the receive
    std::uint64_t charge = 0;           // of the eager credit, as long as nobody has posted
    bool is_eager = false;
    bool is_requested = false;
    std::string failure;                // never completes: why
  };
  using Messages = KeyMap<Message>;

  bool begin(const FrameHeader& header);
  void complete(Messages::iterator message);
  void fail(Messages::iterator message, const std::string& reason);
  void forget(const MessageKey& key);
  bool isStale(const MessageKey& key) const;
  void credit(std::uint64_t num_bytes);
  void detach(const MessageKey& key);

  const EngineOptions& options_;
  Lanes& lanes_;
  PostCounter counter_;
  Messages messages_;
  std::size_t num_posted_ = 0;
  std::deque<MessageKey> ended_;  // the engine's own receives that ended early
  std::uint64_t charged_bytes_ = 0;
  std::uint64_t credit_bytes_ = 0;    // consumed, not yet returned
  std::uint64_t bulk_bytes_ = 0;
  std::uint64_t bytes_received_ = 0;
  std::uint64_t corrupt_frames_ = 0;
};

}  // namespace dora
