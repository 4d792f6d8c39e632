// One peer: its two connections, what goes each way, and whether it is alive.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gate.h"
#include "inbox.h"
#include "media.h"
#include "outbox.h"

namespace dora {

class Peer;

// One frame as it passed, for the log: from its header to the last byte of its payload.
struct LoggedFrame {
  double start_s;
  double end_s;
  bool is_sent;
  std::uint32_t peer;
  FrameHeader header;
};

// What a peer needs of the engine.
class PeerHost {
 public:
  virtual ~PeerHost() = default;
  virtual Media& media() = 0;
  virtual void log(double start_s, bool is_sent, std::uint32_t peer,
                   const FrameHeader& header) = 0;
  // A message that no receive is posted for has begun.
  virtual void onUnexpected(Peer& peer, const MessageKey& key) = 0;
};

// Thread safety: none; whoever holds the engine's state.
class Peer : public ConnectionOwner {
 public:
  enum class State { kConnecting, kOpen, kLost };

  Peer(std::uint32_t rank, const EngineOptions& options, PeerHost& host);

  const std::uint32_t rank;
  State state = State::kConnecting;
  std::string lost_reason;

  Lanes lanes;
  Outbox outbox;
  Inbox inbox;

  // An authenticated connection; the peer is open when it has both.
  void attach(std::unique_ptr<Connection> connection);
  bool hasLane(int lane) const { return lanes.lane[static_cast<std::size_t>(lane)] != nullptr; }

  // From now on payloads pass emulated media.
  void setGate(Gate gate) { gate_.emplace(std::move(gate)); }
  // When it wants to be flushed again.
  double wakeS(double now_s) const;

  // Writes what may leave.
  void flush();

  // A lane has ended: true if the peer is lost with it; else the other lane drains first.
  bool onLaneEnded(int lane, const std::string& reason, double now_s);
  // Fails all operations with this peer.
  void lose(const std::string& reason, Outcome outcome = Outcome::kPeerLost);
  // Pings when silent. Returns a reason if the peer must be taken for lost.
  std::string tick(double now_s);
  // Fails all operations with this peer and says goodbye; its connections end when it ends them.
  void leave(const std::string& reason);

  double rttS() const { return rtt_s_; }

  std::uint8_t* onHeader(Connection& connection, const FrameHeader& header) override;
  void onFrame(Connection& connection, const FrameHeader& header, const std::uint8_t* payload,
               bool is_intact) override;
  void onRoom(Connection& connection) override;
  void onDataSent(Connection& connection, const FrameHeader& header) override;

 private:
  int laneOf(const Connection& connection) const;
  void fill(Connection& connection, int lane, double now_s);
  void onPong(const FrameHeader& header);

  const EngineOptions& options_;
  PeerHost& host_;
  std::optional<Gate> gate_;
  std::array<double, 2> began_s_{};   // per lane: the frame that is arriving
  std::array<double, 2> filled_s_{};  // per lane: the data frame that is leaving
  double ticked_s_ = 0;
  double awake_s_ = 0;  // since when this process has run without a long break
  double pinged_s_ = 0;
  double rtt_s_ = 0;
  std::uint64_t pings_ = 0;
  double drain_until_s_ = 0;
  std::string ended_reason_;
  bool has_said_bye_ = false;
  bool has_heard_bye_ = false;
};

}  // namespace dora
