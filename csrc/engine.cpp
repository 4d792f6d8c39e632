#include "engine.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <future>

namespace dora {

Engine::Engine(const EngineOptions& options)
    : options_(options),
      process_(::getpid()),
      epoch_(options.epoch),
      dialer_(options_, reactor_, *this),
      media_(options.rank, options.aging_s, [this](std::uint32_t rank, const FrameHeader& header) {
        auto peer = peers_.find(rank);
        if (peer != peers_.end()) peer->second->lanes.control(header);
      }) {
  if (!options_.buckets.empty()) {
    buckets_ = std::make_shared<Buckets>(options_.buckets);
    options_.has_pacing = false;  // the kernel's path has another rate
  }
  thread_ = std::thread([this] { run(); });
  pthread_setname_np(thread_.native_handle(), "dora-io");
}

Engine::~Engine() {
  if (::getpid() == process_) {
    close(0);
  } else if (thread_.joinable()) {
    thread_.detach();  // it exists in the parent only
  }
}

// ------------------------------------------------------------ other threads

void Engine::checkProcess() const {
  if (::getpid() != process_) {
    throw std::logic_error("this process was forked from the one that owns the engine: create an "
                           "engine in the child, or start it with the spawn method");
  }
}

void Engine::checkUsable() const {
  checkProcess();
  if (is_closed_) throw std::runtime_error("the engine is closed");
}

// Does a caller's work in his own thread if the state is free; earlier work goes first.
bool Engine::tryAtOnce(const Work& work) {
  std::unique_lock<std::mutex> state(state_, std::try_to_lock);
  if (!state) return false;
  runWork();
  work();
  flushAll();
  bool is_late = nowS() + nextWakeS() < planned_wake_s_;
  if (!isSettled()) lead_.recall();
  state.unlock();
  if (is_late) reactor_.wake();  // a timer has come before all others
  return true;
}

void Engine::defer(Work work) {
  if (tryAtOnce(work)) return;
  bool is_first = false, is_stopped;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_stopped = is_stopped_;
    if (!is_stopped) {
      is_first = work_.empty();
      work_.push_back(std::move(work));
    }
  }
  if (is_stopped) return work();  // there are no peers: what was posted fails at once
  if (is_first) {
    reactor_.wake();
    lead_.recall();
  }
}

void Engine::call(const Work& work) {
  auto done = std::make_shared<std::promise<void>>();
  std::future<void> result = done->get_future();
  defer([&work, done] {
    try {
      work();
      done->set_value();
    } catch (...) {
      done->set_exception(std::current_exception());
    }
  });
  result.get();
}

TransferPtr Engine::makeTransfer(bool is_send, void* data, std::uint64_t num_bytes,
                                 std::int32_t peer, MessageKey key, Priority priority,
                                 double timeout_s) {
  checkUsable();
  auto transfer = std::make_shared<Transfer>(nextId(), weak_from_this());
  transfer->is_send = is_send;
  transfer->self = options_.rank;
  transfer->peer = peer;
  transfer->data = static_cast<std::uint8_t*>(data);
  transfer->num_bytes = num_bytes;
  transfer->key = key;
  transfer->priority = priority;
  transfer->timeout_s = timeout_s;
  return transfer;
}

OperationPtr Engine::send(const void* data, std::uint64_t num_bytes, std::uint32_t dst,
                          MessageKey key, Priority priority, double timeout_s) {
  auto transfer = makeTransfer(true, const_cast<void*>(data), num_bytes,
                               static_cast<std::int32_t>(dst), key, priority, timeout_s);
  defer([this, transfer] { post(transfer); });
  return transfer;
}

OperationPtr Engine::receive(void* data, std::uint64_t num_bytes, std::int32_t src, MessageKey key,
                             double timeout_s) {
  auto transfer = makeTransfer(false, data, num_bytes, src, key, {}, timeout_s);
  defer([this, transfer] { post(transfer); });
  return transfer;
}

void Engine::cancel(const OperationPtr& operation) {
  checkProcess();
  if (is_closed_) return;
  auto transfer = std::dynamic_pointer_cast<Transfer>(operation);
  if (transfer) {
    defer([this, transfer] { endTransfer(*transfer, Outcome::kCancelled, "it was cancelled"); });
  }
}

void Engine::reprioritise(const OperationPtr& operation, Priority priority) {
  checkUsable();
  auto transfer = std::dynamic_pointer_cast<Transfer>(operation);
  if (!transfer || !transfer->is_send) return;
  defer([this, transfer, priority] {
    auto peer = peers_.find(static_cast<std::uint32_t>(transfer->peer));
    if (peer != peers_.end()) peer->second->outbox.reprioritise(*transfer, priority);
  });
}

void Engine::connect(const std::map<std::uint32_t, PeerAddress>& peers, const MediaOptions& media,
                     const std::map<std::uint32_t, double>& rates) {
  checkUsable();
  if (peers.count(options_.rank) > 0) {
    throw std::invalid_argument("peers: given rank " + std::to_string(options_.rank) +
                                ", which is this one, allowed: the others");
  }
  call([&] {
    double now_s = nowS();
    PeerHost& host = *this;
    connect_limit_s_ = now_s + options_.connect_timeout_s;
    for (const auto& [rank, address] : peers) {
      auto [peer, is_new] = peers_.try_emplace(rank, nullptr);
      if (!is_new) continue;
      peer->second = std::make_unique<Peer>(rank, options_, host);
      if (buckets_) peer->second->setGate(Gate(buckets_, options_.rank, rank));
      auto rate = rates.find(rank);
      if (rate != rates.end()) peer->second->outbox.setKnownRate(rate->second);
      {
        std::lock_guard<std::mutex> lock(mutex_);
        states_[rank] = Peer::State::kConnecting;
      }
      if (options_.rank > rank) continue;  // the lower rank calls
      for (int lane : {Lanes::kUrgentLane, Lanes::kBulkLane}) {
        dialer_.call(rank, lane, address, now_s);
      }
    }
    MediaOptions known = media;  // a medium whose arbiter nobody can ask is used freely
    for (auto arbiter = known.arbiters.begin(); arbiter != known.arbiters.end();) {
      bool is_known = arbiter->second == options_.rank || peers_.count(arbiter->second) > 0;
      arbiter = is_known ? std::next(arbiter) : known.arbiters.erase(arbiter);
    }
    media_.configure(known);
  });
}

std::vector<std::uint32_t> Engine::waitConnected(double timeout_s) {
  checkUsable();
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, std::chrono::duration<double>(std::min(timeout_s, 86400.0)), [this] {
    return is_closed_ || std::none_of(states_.begin(), states_.end(), [](const auto& entry) {
             return entry.second == Peer::State::kConnecting;
           });
  });
  std::vector<std::uint32_t> missing;
  for (const auto& [rank, state] : states_) {
    if (state != Peer::State::kOpen) missing.push_back(rank);
  }
  return missing;
}

std::vector<EngineEvent> Engine::events() {
  checkProcess();
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<EngineEvent> taken;
  taken.swap(events_);
  return taken;
}

EngineStats Engine::stats() {
  checkUsable();
  EngineStats stats;
  call([&] {
    stats = counters_;
    for (const auto& [rank, peer] : peers_) {
      const char* states[] = {"connecting", "open", "lost"};
      stats.peers.push_back({rank, states[static_cast<int>(peer->state)], peer->lost_reason,
                             peer->outbox.rateBytesPerS().value_or(0), peer->rttS(),
                             peer->outbox.chunkBytes(), peer->outbox.bytesSent(),
                             peer->inbox.bytesReceived(), peer->inbox.unexpectedBytes(),
                             peer->inbox.corruptFrames(),
                             peer->outbox.queue(Lanes::kUrgentLane).stats(),
                             peer->outbox.queue(Lanes::kBulkLane).stats()});
    }
  });
  return stats;
}

std::vector<LoggedFrame> Engine::log() {
  checkUsable();
  std::vector<LoggedFrame> copy;
  call([&] { copy.assign(frames_.begin(), frames_.end()); });
  return copy;
}

void Engine::reconfigure(std::uint32_t epoch) {
  checkUsable();
  if (epoch <= epoch_) {
    throw std::invalid_argument("epoch: given " + std::to_string(epoch) +
                                ", allowed: more than the current " + std::to_string(epoch_));
  }
  call([&] {
    dropPeers("the group was reconfigured", Outcome::kClosed);
    options_.epoch = epoch;
    epoch_ = epoch;
    dialer_.reset();
    media_.configure({});
  });
}

void Engine::close(double linger_s) {
  if (::getpid() != process_) return;  // the connections are the parent's
  std::lock_guard<std::mutex> lock(closing_);
  if (!thread_.joinable()) return;
  double limit_s = nowS() + linger_s;
  for (bool is_idle = false; !is_idle && nowS() < limit_s;) {
    call([&] { is_idle = isIdle(); });
    if (!is_idle) ::usleep(1000);
  }
  linger_s_ = linger_s;
  is_closed_ = true;
  is_stopping_ = true;
  reactor_.wake();
  lead_.recall();
  thread_.join();
  std::lock_guard<std::mutex> state_lock(mutex_);
  changed_.notify_all();
}

}  // namespace dora
