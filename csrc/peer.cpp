#include "peer.h"

#include <algorithm>
#include <limits>

namespace dora {

namespace {

// When one connection ends, the other may still hold data that was sent before: for so long after
// a crash. After a goodbye it is sure to end by itself, however slow or paced the link.
constexpr double kDrainS = 0.8;

}  // namespace

Peer::Peer(std::uint32_t peer_rank, const EngineOptions& options, PeerHost& host)
    : rank(peer_rank),
      outbox(options, lanes),
      inbox(options, lanes),
      options_(options),
      host_(host) {}

void Peer::attach(std::unique_ptr<Connection> connection) {
  int lane = connection->session().lane;
  if (options_.has_dscp && lane == Lanes::kUrgentLane) {
    connection->socket().setTrafficClass(kUrgent);
  }
  lanes.attach(lane, std::move(connection));
  if (lane == Lanes::kBulkLane) outbox.adapt(nowS());
  if (!hasLane(0) || !hasLane(1)) return;
  state = State::kOpen;
  if (gate_) gate_->onJoined();
}

int Peer::laneOf(const Connection& connection) const {
  return lanes.lane[Lanes::kUrgentLane].get() == &connection ? Lanes::kUrgentLane
                                                             : Lanes::kBulkLane;
}

// ------------------------------------------------------------ frames

std::uint8_t* Peer::onHeader(Connection& connection, const FrameHeader& header) {
  began_s_[static_cast<std::size_t>(laneOf(connection))] = nowS();
  if (header.type != FrameType::kData) return nullptr;
  return inbox.onHeader(header);
}

void Peer::onFrame(Connection& connection, const FrameHeader& header, const std::uint8_t* payload,
                   bool is_intact) {
  bool is_new = false;
  host_.log(began_s_[static_cast<std::size_t>(laneOf(connection))], false, rank, header);
  switch (header.type) {
    case FrameType::kData:
      if (gate_) gate_->onReceived(header.length);
      if (laneOf(connection) == Lanes::kBulkLane) inbox.onBulkData(header);
      is_new = inbox.onData(header, payload, is_intact);
      break;
    case FrameType::kRequest: is_new = inbox.onRequest(header); break;
    case FrameType::kGrant: outbox.onGrant(header); break;
    case FrameType::kCredit: outbox.onCredit(header); break;
    case FrameType::kAck: outbox.onAck(header, nowS()); break;
    case FrameType::kCancel: {
      std::string reason(reinterpret_cast<const char*>(payload), payload ? header.length : 0);
      if (header.flags & kFlagToSender) {
        outbox.onCancel(header, reason);
      } else {
        inbox.onCancel(header, reason);
      }
      break;
    }
    case FrameType::kPing: {
      FrameHeader pong = header;
      pong.type = FrameType::kPong;
      lanes.control(pong);
      break;
    }
    case FrameType::kPong: onPong(header); break;
    case FrameType::kBye:
      has_heard_bye_ = true;
      ended_reason_ = "the connection was closed; that process has ended";
      break;
    default: host_.media().onFrame(rank, header, nowS());
  }
  if (is_new) host_.onUnexpected(*this, keyOf(header));
}

void Peer::onRoom(Connection& connection) {
  int lane = laneOf(connection);
  double now_s = nowS();
  fill(connection, lane, now_s);
  if (!gate_) return;
  if (!connection.sending()) return gate_->rest(lane);
  gate_->begin(lane, connection.sending()->length, now_s);
  connection.holdPayload(!gate_->isOpen(lane, now_s));
}

void Peer::fill(Connection& connection, int lane, double now_s) {
  if (lane == Lanes::kBulkLane) {
    std::optional<Priority> head = outbox.bulkHead(now_s);
    if (!head) {
      host_.media().done(rank, now_s);
      return;
    }
    if (!host_.media().mayUse(rank, *head, now_s)) return outbox.pause();
  }
  filled_s_[static_cast<std::size_t>(lane)] = now_s;
  outbox.fill(connection, lane, now_s);
}

double Peer::wakeS(double now_s) const {
  double wake_s = std::numeric_limits<double>::infinity();
  if (!gate_ || state != State::kOpen) return wake_s;
  for (int lane : {Lanes::kUrgentLane, Lanes::kBulkLane}) {
    // A full socket reports when it has room.
    const auto& connection = lanes.lane[static_cast<std::size_t>(lane)];
    if (connection && !connection->isBlocked()) wake_s = std::min(wake_s, gate_->wakeS(lane, now_s));
  }
  return wake_s;
}

void Peer::onDataSent(Connection& connection, const FrameHeader& header) {
  int lane = laneOf(connection);
  double& filled_s = filled_s_[static_cast<std::size_t>(lane)];
  if (gate_) filled_s = gate_->end(lane);
  host_.log(filled_s, true, rank, header);
  outbox.onDataSent(lane);
}

void Peer::flush() {
  // Bulk first: what it tells the peer (a request, a wish) leaves with the urgent lane.
  for (int lane : {Lanes::kBulkLane, Lanes::kUrgentLane}) {
    Connection* connection = lanes.lane[static_cast<std::size_t>(lane)].get();
    if (!connection) continue;
    if (gate_) {
      connection->hold(gate_->isDown());
      if (connection->sending()) connection->holdPayload(!gate_->isOpen(lane, nowS()));
    }
    connection->flush();
    if (has_said_bye_) connection->endWriting();
  }
}

// ------------------------------------------------------------ life and death

bool Peer::onLaneEnded(int lane, const std::string& reason, double now_s) {
  if (ended_reason_.empty()) ended_reason_ = reason;
  if (lanes.lane[static_cast<std::size_t>(lane)]) {
    lanes.lane[static_cast<std::size_t>(lane)]->detachTarget();
    lanes.lane[static_cast<std::size_t>(lane)].reset();
  }
  drain_until_s_ = now_s + (has_heard_bye_ ? options_.dead_s : kDrainS);
  return !hasLane(0) && !hasLane(1);
}

void Peer::lose(const std::string& reason, Outcome outcome) {
  state = State::kLost;
  lost_reason = reason.empty() ? ended_reason_ : reason;
  outbox.failAll(outcome, lost_reason);
  inbox.failAll(outcome, lost_reason);
  lanes.drop();
}

std::string Peer::tick(double now_s) {
  if (state != State::kOpen) return "";
  if (drain_until_s_ > 0) return now_s > drain_until_s_ ? ended_reason_ : "";
  // Who was stopped himself can not tell whether the others were silent meanwhile.
  if (now_s - ticked_s_ > options_.dead_s / 2) awake_s_ = now_s;
  ticked_s_ = now_s;
  double heard_s =
      std::max({awake_s_, lanes.lane[0]->lastHeardS(), lanes.lane[1]->lastHeardS()});
  if (now_s - heard_s > options_.dead_s) {
    return "no sign of life for " + std::to_string(static_cast<int>(now_s - heard_s)) +
           " s: the link is down or the process hangs";
  }
  if (now_s - std::max(pinged_s_, heard_s) >= options_.heartbeat_s ||
      now_s - pinged_s_ >= 5 * options_.heartbeat_s) {
    pinged_s_ = now_s;
    FrameHeader ping;
    ping.type = FrameType::kPing;
    ping.seq = ++pings_;
    lanes.control(ping);
  }
  outbox.adapt(now_s);
  return "";
}

void Peer::onPong(const FrameHeader& header) {
  if (header.seq != pings_) return;
  double sample_s = nowS() - pinged_s_;
  rtt_s_ = rtt_s_ > 0 ? 0.875 * rtt_s_ + 0.125 * sample_s : sample_s;
}

void Peer::leave(const std::string& reason) {
  outbox.failAll(Outcome::kClosed, reason);
  inbox.failAll(Outcome::kClosed, reason);
  has_said_bye_ = true;
  FrameHeader bye;
  bye.type = FrameType::kBye;
  for (auto& connection : lanes.lane) {
    if (connection) connection->sendControl(bye);
  }
}

}  // namespace dora
