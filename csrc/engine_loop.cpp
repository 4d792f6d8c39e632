// The event loop: waits for sockets and timers, and does what they ask for.
#include <unistd.h>

#include <algorithm>
#include <limits>

#include "engine.h"

namespace dora {

namespace {

std::uint64_t tokenOf(std::uint32_t rank, int lane) {
  return std::uint64_t{rank} << 1 | static_cast<std::uint64_t>(lane);
}

}  // namespace

void Engine::run() {
  if (buckets_) wakePunctually();
  while (!is_stopping_) {
    turn(std::numeric_limits<double>::infinity());
    if (lead_.isWanted()) offerLead();
  }
  leave();
  std::lock_guard<std::mutex> state(state_);
  dropPeers("the engine was closed", Outcome::kClosed);
  std::vector<Work> rest;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    rest.swap(work_);
    is_stopped_ = true;
  }
  for (Work& item : rest) item();
}

// Says goodbye, and reads until the peers have read all: the kernel drops what it has not sent yet
// when anything of a peer meets a closed socket (TCP: RFC 1122, 1989, section 4.2.2.13).
void Engine::leave() {
  const std::string reason = "the engine was closed";
  {
    std::lock_guard<std::mutex> state(state_);
    dialer_.stop();
    for (auto& [rank, peer] : peers_) {
      if (peer->state == Peer::State::kOpen) peer->leave(reason);
      if (peer->state == Peer::State::kConnecting) losePeer(*peer, reason, Outcome::kClosed);
    }
    failFromAny(reason, Outcome::kClosed);
    flushAll();
  }
  auto hasPeers = [this] {
    std::lock_guard<std::mutex> state(state_);
    return std::any_of(peers_.begin(), peers_.end(),
                       [](const auto& entry) { return entry.second->state == Peer::State::kOpen; });
  };
  for (double limit_s = nowS() + linger_s_; hasPeers() && nowS() < limit_s;) turn(limit_s);
}

// Waits for what comes next, until `limit_s` at the latest, and does it. Only with the lead.
void Engine::turn(double limit_s) {
  double wait_s = planWake(limit_s);
  const std::vector<Reactor::Event>& events = reactor_.wait(wait_s);
  std::lock_guard<std::mutex> state(state_);
  for (const Reactor::Event& event : events) handle(event);
  runWork();
  tick();
  flushAll();
}

double Engine::planWake(double limit_s) {
  std::lock_guard<std::mutex> state(state_);
  double now_s = nowS();
  planned_wake_s_ = std::min(now_s + nextWakeS(), limit_s);
  return std::max(0.0, planned_wake_s_ - now_s);
}

// ------------------------------------------------------------ who leads

void Engine::attend() noexcept {
  if (::getpid() == process_) lead_.recall();
}

// As on the I/O thread, nothing that the loop does may throw.
void Engine::drive(const Operation& operation, double timeout_s) noexcept {
  // In a forked child the sockets are still the parent's.
  if (::getpid() != process_ || !lead_.tryTake()) return;
  double limit_s = nowS() + timeout_s;
  while (!operation.isDone() && !is_stopping_ && nowS() < limit_s) turn(limit_s);
  {
    std::lock_guard<std::mutex> state(state_);
    lead_.leave(!isQuiet());
  }
  recallForWork();
}

// The I/O thread lets callers lead if it has nothing to do.
void Engine::offerLead() {
  {
    std::lock_guard<std::mutex> state(state_);
    if (!isQuiet()) return;
    lead_.open();
  }
  recallForWork();
  lead_.standBy();
}

// After the lead was opened. Who could not have the state while it was, and left his work, found the
// lead taken; nobody else would look at that work.
void Engine::recallForWork() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!work_.empty()) lead_.recall();
}

// Nothing is under way but receives, whose data can wait in the socket for a moment.
bool Engine::isSettled() const {
  return isIdle() && std::none_of(peers_.begin(), peers_.end(), [](const auto& entry) {
           return entry.second->state == Peer::State::kConnecting;
         });
}

// Nothing is under way, and no other rank counts on prompt answers: the loop may rest for a moment.
bool Engine::isQuiet() const {
  if (buckets_ || !media_.isEmpty() || !from_any_.empty() || !isSettled()) return false;
  return std::all_of(peers_.begin(), peers_.end(), [](const auto& entry) {
    return entry.second->inbox.isIdle();
  });
}

// ------------------------------------------------------------ what the loop does

void Engine::runWork() {
  std::vector<Work> work;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    work.swap(work_);
  }
  for (Work& item : work) item();
}

void Engine::handle(const Reactor::Event& event) {
  if (event.token >= Dialer::kFirstToken) return dialer_.onEvent(event, nowS());
  auto found = peers_.find(static_cast<std::uint32_t>(event.token >> 1));
  if (found == peers_.end()) return;
  int lane = static_cast<int>(event.token & 1);
  Peer& peer = *found->second;
  Connection* connection = peer.lanes.lane[static_cast<std::size_t>(lane)].get();
  if (!connection) return;
  try {
    connection->onReady(event.is_readable, event.is_writable);
  } catch (const ConnectionLost& lost) {
    laneEnded(peer, lane, lost.what());
  } catch (const ProtocolError& error) {
    ++counters_.protocol_errors;
    losePeer(peer, std::string("the protocol was broken: ") + error.what());
  }
}

void Engine::flushAll() {
  for (int round = 0; round < 2; ++round) {  // a medium that is freed lets other peers go on
    for (auto& [rank, peer] : peers_) {
      if (peer->state == Peer::State::kLost) continue;
      peer->flush();
      watch(*peer);
    }
    if (!media_.takeFreed()) return;
  }
}

// Asks for room where something waits, and only there.
void Engine::watch(Peer& peer) {
  for (int lane : {Lanes::kUrgentLane, Lanes::kBulkLane}) {
    Connection* connection = peer.lanes.lane[static_cast<std::size_t>(lane)].get();
    if (!connection) continue;
    bool& is_watched = watched_[tokenOf(peer.rank, lane)];
    if (connection->wantsWrite() == is_watched) continue;
    is_watched = connection->wantsWrite();
    reactor_.change(connection->socket(), tokenOf(peer.rank, lane), is_watched);
  }
}

void Engine::tick() {
  double now_s = nowS();
  expire(now_s);
  if (now_s - last_tick_s_ < kBusyTickS) return;
  last_tick_s_ = now_s;
  dialer_.tick(now_s);
  media_.tick(now_s);
  for (auto& [rank, peer] : peers_) {
    std::string reason = peer->tick(now_s);
    if (!reason.empty()) losePeer(*peer, reason);
    if (peer->state == Peer::State::kConnecting && now_s > connect_limit_s_) {
      losePeer(*peer, "not connected within " +
                          std::to_string(static_cast<int>(options_.connect_timeout_s)) + " s: " +
                          dialer_.lastProblem(rank));
    }
  }
}

bool Engine::isIdle() const {
  return std::all_of(peers_.begin(), peers_.end(), [](const auto& entry) {
    const Peer& peer = *entry.second;
    bool has_unsent = false;
    for (const auto& connection : peer.lanes.lane) {
      has_unsent = has_unsent || (connection && connection->hasUnsent());
    }
    return peer.state == Peer::State::kLost || (peer.outbox.isIdle() && !has_unsent);
  });
}

}  // namespace dora
