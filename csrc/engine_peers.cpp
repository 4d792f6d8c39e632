// The part of the engine that joins operations with peers.
#include <algorithm>
#include <cmath>

#include "engine.h"

namespace dora {

void Engine::post(const TransferPtr& transfer) {
  Transfer& t = *transfer;
  if (is_closed_) return t.fail(Outcome::kClosed, "the engine is closed");
  if (!t.is_send && t.peer == kAnySource) {
    postFromAny(transfer);
  } else {
    auto found = peers_.find(static_cast<std::uint32_t>(t.peer));
    if (found == peers_.end()) {
      return t.fail(Outcome::kClosed, "there is no such peer");
    }
    Peer& peer = *found->second;
    bool is_lost = peer.state == Peer::State::kLost;
    if (is_lost && (t.is_send || !peer.inbox.hasWhole(t.key))) {
      return t.fail(Outcome::kPeerLost, peer.lost_reason);
    }
    if (t.is_send) {
      peer.outbox.post(transfer, nowS());
    } else {
      t.source = t.peer;
      peer.inbox.post(transfer);
    }
  }
  if (!t.isDone() && std::isfinite(t.timeout_s)) addTimer(nowS() + t.timeout_s, transfer);
}

// Takes the first message with that group and tag that has begun to arrive, else waits for one.
void Engine::postFromAny(const TransferPtr& transfer) {
  for (auto& [rank, peer] : peers_) {
    if (!peer->inbox.hasNext(transfer->key.group, transfer->key.tag)) continue;
    transfer->source = transfer->peer = static_cast<std::int32_t>(rank);
    peer->inbox.post(transfer);
    return;
  }
  from_any_.push_back(transfer);
}

void Engine::onUnexpected(Peer& peer, const MessageKey& key) {
  auto waiting = std::find_if(from_any_.begin(), from_any_.end(), [&](const auto& transfer) {
    return transfer->key.group == key.group && transfer->key.tag == key.tag;
  });
  if (waiting == from_any_.end() || !peer.inbox.isNext(key)) return;
  TransferPtr transfer = std::move(*waiting);
  from_any_.erase(waiting);
  transfer->source = transfer->peer = static_cast<std::int32_t>(peer.rank);
  peer.inbox.post(transfer);
}

void Engine::endTransfer(Transfer& transfer, Outcome outcome, const std::string& reason) {
  if (transfer.isDone()) return;
  auto waiting = std::find_if(from_any_.begin(), from_any_.end(),
                              [&](const auto& other) { return other.get() == &transfer; });
  if (waiting != from_any_.end()) {
    TransferPtr kept = std::move(*waiting);
    from_any_.erase(waiting);
    return transfer.fail(outcome, reason);
  }
  auto peer = peers_.find(static_cast<std::uint32_t>(transfer.peer));
  if (peer == peers_.end()) return transfer.fail(outcome, reason);
  if (transfer.is_send) {
    peer->second->outbox.cancel(transfer, outcome, reason);
  } else {
    peer->second->inbox.cancel(transfer, outcome, reason);
  }
}

// ------------------------------------------------------------ losing peers

void Engine::laneEnded(Peer& peer, int lane, const std::string& reason) {
  Connection* connection = peer.lanes.lane[static_cast<std::size_t>(lane)].get();
  reactor_.remove(connection->socket());
  watched_.erase(std::uint64_t{peer.rank} << 1 | static_cast<std::uint64_t>(lane));
  bool was_connecting = peer.state == Peer::State::kConnecting;
  if (peer.onLaneEnded(lane, reason, nowS()) || was_connecting) losePeer(peer, "");
}

void Engine::losePeer(Peer& peer, const std::string& reason, Outcome outcome) {
  for (int lane : {Lanes::kUrgentLane, Lanes::kBulkLane}) {
    Connection* connection = peer.lanes.lane[static_cast<std::size_t>(lane)].get();
    if (!connection) continue;
    reactor_.remove(connection->socket());
    watched_.erase(std::uint64_t{peer.rank} << 1 | static_cast<std::uint64_t>(lane));
  }
  peer.lose(reason, outcome);
  if (media_.onLost(peer.rank, nowS())) {
    report("arbiter_lost", peer.rank, "shared media are used without an arbiter from here on");
  }
  report("peer_lost", peer.rank, peer.lost_reason);
}

void Engine::dropPeers(const std::string& reason, Outcome outcome) {
  for (auto& [rank, peer] : peers_) {
    if (peer->state != Peer::State::kLost) losePeer(*peer, reason, outcome);
  }
  peers_.clear();
  failFromAny(reason, outcome);
  std::lock_guard<std::mutex> lock(mutex_);
  states_.clear();
}

void Engine::failFromAny(const std::string& reason, Outcome outcome) {
  for (auto& transfer : from_any_) transfer->fail(outcome, reason);
  from_any_.clear();
}

// ------------------------------------------------------------ connecting

bool Engine::isExpected(std::uint32_t rank, int lane) {
  auto peer = peers_.find(rank);
  return peer != peers_.end() && rank < options_.rank && lane < 2 &&
         peer->second->state == Peer::State::kConnecting && !peer->second->hasLane(lane);
}

void Engine::onConnected(std::unique_ptr<Connection> connection) {
  // Two calls of one rank may have been under way at once: the first one wins.
  connection->openSession(options_.protection);
  std::uint32_t rank = connection->session().peer_rank;
  int lane = connection->session().lane;
  auto found = peers_.find(rank);
  if (found == peers_.end() || found->second->state != Peer::State::kConnecting ||
      found->second->hasLane(lane)) {
    return;
  }
  Peer& peer = *found->second;
  reactor_.add(connection->socket(), std::uint64_t{rank} << 1 | static_cast<std::uint64_t>(lane),
               false);
  watched_.erase(std::uint64_t{rank} << 1 | static_cast<std::uint64_t>(lane));
  connection->setOwner(peer);
  peer.attach(std::move(connection));
  if (peer.state == Peer::State::kOpen) report("connected", rank, "");
}

void Engine::onCallFailed(std::uint32_t rank, const std::string& reason) {
  ++counters_.refused;
  auto peer = peers_.find(rank);
  if (peer != peers_.end() && peer->second->state == Peer::State::kConnecting) {
    losePeer(*peer->second, reason);
  }
}

void Engine::onRefused(std::int64_t rank, const std::string& reason) {
  ++counters_.refused;
  report("refused", rank, reason);
}

void Engine::report(const std::string& kind, std::int64_t rank, const std::string& text) {
  std::lock_guard<std::mutex> lock(mutex_);
  constexpr std::size_t kMaxEvents = 4096;
  if (events_.size() < kMaxEvents) events_.push_back({kind, rank, text});
  auto state = states_.find(static_cast<std::uint32_t>(rank));
  if (state != states_.end() && state->second == Peer::State::kConnecting) {
    if (kind == "connected") state->second = Peer::State::kOpen;
    if (kind == "peer_lost") state->second = Peer::State::kLost;
  }
  changed_.notify_all();
}

void Engine::log(double start_s, bool is_sent, std::uint32_t peer, const FrameHeader& header) {
  if (options_.log_frames == 0) return;
  frames_.push_back({start_s, nowS(), is_sent, peer, header});
  if (frames_.size() > options_.log_frames) frames_.pop_front();
}

}  // namespace dora
