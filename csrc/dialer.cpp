#include "dialer.h"

#include <algorithm>

namespace dora {

namespace {

constexpr double kFirstBackoffS = 0.05, kMaxBackoffS = 1.0;

// Connecting and authenticating take a few round trips; slower is a stranger or a lost packet.
constexpr double kAttemptS = 5.0;

bool mayChange(Reject reason) { return reason == Reject::kEpoch || reason == Reject::kMember; }

}  // namespace

Dialer::Dialer(const EngineOptions& options, Reactor& reactor, DialerOwner& owner)
    : options_(options),
      reactor_(reactor),
      owner_(owner),
      listener_(std::make_unique<Socket>(Socket::listen(options.host, options.port))),
      port_(listener_->port()) {
  reactor_.add(*listener_, kFirstToken, false);
}

Identity Dialer::identity(int lane) const {
  Identity self;
  self.key = options_.key;
  self.job = options_.job;
  self.epoch = options_.epoch;
  self.rank = options_.rank;
  self.lane = static_cast<std::uint8_t>(lane);
  self.protection = options_.protection;
  return self;
}

void Dialer::call(std::uint32_t rank, int lane, const PeerAddress& address, double now_s) {
  dial(std::make_unique<Call>(Call{rank, lane, address, now_s, kFirstBackoffS}), now_s);
}

void Dialer::dial(std::unique_ptr<Call> call, double now_s) {
  try {
    Socket socket = Socket::connect(call->address.host, call->address.port);
    Handshake handshake = Handshake::initiate(identity(call->lane), call->rank);
    auto connection =
        std::make_unique<Connection>(std::move(socket), std::move(handshake), options_.dead_s);
    add({std::move(connection), std::move(call), false, false, now_s + kAttemptS});
  } catch (const ConnectionLost& lost) {
    retry(std::move(call), lost.what(), now_s);
  }
}

void Dialer::acceptAll(double now_s) {
  while (auto socket = listener_->accept()) {
    auto strangers = std::count_if(pending_.begin(), pending_.end(),
                                   [](const auto& entry) { return !entry.second.call; });
    if (static_cast<std::size_t>(strangers) >= kMaxStrangers) continue;
    Handshake handshake = Handshake::respond(identity(0));
    auto connection =
        std::make_unique<Connection>(std::move(*socket), std::move(handshake), options_.dead_s);
    add({std::move(connection), nullptr, true, false, now_s + kAttemptS});
  }
}

void Dialer::add(Pending pending) {
  reactor_.add(pending.connection->socket(), next_token_, !pending.is_connected);
  pending_.emplace(next_token_++, std::move(pending));
}

void Dialer::retry(std::unique_ptr<Call> call, const std::string& problem, double now_s) {
  problems_[call->rank] =
      call->address.host + " port " + std::to_string(call->address.port) + ": " + problem;
  call->next_s = now_s + call->backoff_s;
  call->backoff_s = std::min(kMaxBackoffS, 2 * call->backoff_s);
  waiting_.push_back(std::move(call));
}

void Dialer::end(Pendings::iterator pending) {
  reactor_.remove(pending->second.connection->socket());
  pending_.erase(pending);
}

void Dialer::reset() {
  while (!pending_.empty()) end(pending_.begin());
  waiting_.clear();
  problems_.clear();
}

void Dialer::stop() {
  reset();
  if (listener_) reactor_.remove(*listener_);
  listener_.reset();
}

// ------------------------------------------------------------ events

void Dialer::onEvent(const Reactor::Event& event, double now_s) {
  if (event.token == kFirstToken) {
    if (listener_) acceptAll(now_s);
    return;
  }
  auto pending = pending_.find(event.token);
  if (pending == pending_.end()) return;
  Pending& p = pending->second;
  try {
    advance(pending, event);
  } catch (const HandshakeError& error) {
    std::unique_ptr<Call> call = std::move(p.call);
    std::int64_t claimed = call ? call->rank : p.connection->handshake().claimedRank();
    end(pending);
    if (!call) {
      owner_.onRefused(claimed, error.what());
    } else if (mayChange(error.reason)) {
      retry(std::move(call), error.what(), now_s);
    } else {
      owner_.onCallFailed(call->rank, error.what());
    }
  } catch (const ConnectionLost& lost) {
    std::unique_ptr<Call> call = std::move(p.call);
    end(pending);
    if (call) retry(std::move(call), lost.what(), now_s);
  }
}

void Dialer::advance(Pendings::iterator pending, const Reactor::Event& event) {
  Pending& p = pending->second;
  Connection& connection = *p.connection;
  if (!p.is_connected) {
    if (!event.is_writable && !event.is_readable) return;
    connection.socket().checkConnected();
    p.is_connected = true;
    connection.sendHandshake();
    reactor_.change(connection.socket(), pending->first, false);
  }
  connection.onReady(event.is_readable, event.is_writable);
  Handshake& handshake = connection.handshake();
  if (!p.is_checked && handshake.hasHello()) {
    p.is_checked = true;
    bool is_probe = handshake.claimedRank() == kProbeRank;
    if (!is_probe && !owner_.isExpected(handshake.claimedRank(), handshake.claimedLane())) {
      handshake.refuse(Reject::kMember);
      connection.sendHandshake();
      connection.flush();
      end(pending);
      return;
    }
  }
  if (!handshake.done()) return;
  std::unique_ptr<Connection> ready = std::move(p.connection);
  reactor_.remove(ready->socket());
  bool is_probe = !p.call && handshake.claimedRank() == kProbeRank;
  pending_.erase(pending);
  if (!is_probe) owner_.onConnected(std::move(ready));
}

void Dialer::tick(double now_s) {
  for (auto pending = pending_.begin(); pending != pending_.end();) {
    auto current = pending++;
    if (now_s < current->second.limit_s) continue;
    std::unique_ptr<Call> call = std::move(current->second.call);
    bool is_connected = current->second.is_connected;
    end(current);
    if (call) retry(std::move(call), is_connected ? "no answer" : "timed out", now_s);
  }
  std::vector<std::unique_ptr<Call>> waiting;
  waiting.swap(waiting_);
  for (auto& call : waiting) {
    if (now_s >= call->next_s) {
      dial(std::move(call), now_s);
    } else {
      waiting_.push_back(std::move(call));
    }
  }
}

std::string Dialer::lastProblem(std::uint32_t rank) const {
  auto problem = problems_.find(rank);
  return problem == problems_.end() ? "it has not called" : problem->second;
}

}  // namespace dora
