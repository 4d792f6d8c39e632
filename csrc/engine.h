// One rank's communication: a single event loop that owns every connection, queue and timer.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "dialer.h"
#include "lead.h"
#include "operation.h"
#include "peer.h"

namespace dora {

// How often the loop looks after peers: idle, and while bulk is under way.
constexpr double kTickS = 0.25, kBusyTickS = 0.01;

// Something that happened beside operations.
struct EngineEvent {
  std::string kind;  // connected, peer_lost, refused, arbiter_lost
  std::int64_t rank;
  std::string text;
};

struct PeerStats {
  std::uint32_t rank;
  std::string state, lost_reason;
  double rate_bytes_per_s, rtt_s;
  std::uint64_t chunk_bytes, bytes_sent, bytes_received, unexpected_bytes, corrupt_frames;
  QueueStats urgent, bulk;
};

struct EngineStats {
  std::uint64_t refused = 0;
  std::uint64_t protocol_errors = 0;
  std::vector<PeerStats> peers;
};

// Sends and receives bytes by priority.
//
// Thread safety: every method may be called from any thread. Peers, queues and sockets belong to
// whoever holds `state_`: who runs the event loop (see Lead) while he handles events, and else a
// caller, who then does his own small piece of work at once instead of waking another thread for it
// (a wake-up costs more than a 4 KiB send). A caller never waits for the state: if it is taken, its
// holder gets the work as a closure. Methods throw std::logic_error in a forked child, where the I/O
// thread does not exist.
class Engine : public Messenger,
               public Driver,
               public std::enable_shared_from_this<Engine>,
               private PeerHost,
               private DialerOwner {
 public:
  explicit Engine(const EngineOptions& options);
  ~Engine() override;

  std::uint16_t port() const { return dialer_.port(); }
  std::uint32_t epoch() const { return epoch_; }
  std::uint32_t rank() const { return options_.rank; }

  void connect(const std::map<std::uint32_t, PeerAddress>& peers, const MediaOptions& media,
               const std::map<std::uint32_t, double>& rates);
  // Blocks until every peer has connected or failed to; returns those that never were connected.
  std::vector<std::uint32_t> waitConnected(double timeout_s);

  OperationPtr send(const void* data, std::uint64_t num_bytes, std::uint32_t dst, MessageKey key,
                    Priority priority, double timeout_s) override;
  OperationPtr receive(void* data, std::uint64_t num_bytes, std::int32_t src, MessageKey key,
                       double timeout_s) override;
  void cancel(const OperationPtr& operation) override;
  void reprioritise(const OperationPtr& operation, Priority priority);

  std::vector<EngineEvent> events();
  EngineStats stats();
  std::vector<LoggedFrame> log();

  void reconfigure(std::uint32_t epoch);
  void close(double linger_s);

  // Throws std::logic_error in a forked child and std::runtime_error after close.
  void checkUsable() const;
  void checkProcess() const;  // the first of these
  std::uint64_t nextId() { return ++ids_; }

  void attend() noexcept override;
  void drive(const Operation& operation, double timeout_s) noexcept override;

 private:
  using Work = std::function<void()>;
  using Timer = std::pair<double, std::weak_ptr<Transfer>>;

  void defer(Work work);
  void call(const Work& work);  // defers and waits
  bool tryAtOnce(const Work& work);
  void run();
  void leave();
  void turn(double limit_s);
  double planWake(double limit_s);
  void offerLead();
  void recallForWork();
  bool isSettled() const;
  bool isQuiet() const;
  void runWork();
  void handle(const Reactor::Event& event);
  void flushAll();
  void watch(Peer& peer);
  void tick();
  void expire(double now_s);
  void addTimer(double time_s, const TransferPtr& transfer);
  double nextWakeS() const;
  bool isIdle() const;

  TransferPtr makeTransfer(bool is_send, void* data, std::uint64_t num_bytes, std::int32_t peer,
                           MessageKey key, Priority priority, double timeout_s);
  void post(const TransferPtr& transfer);
  void postFromAny(const TransferPtr& transfer);
  void endTransfer(Transfer& transfer, Outcome outcome, const std::string& reason);
  void losePeer(Peer& peer, const std::string& reason, Outcome outcome = Outcome::kPeerLost);
  void laneEnded(Peer& peer, int lane, const std::string& reason);
  void report(const std::string& kind, std::int64_t rank, const std::string& text);
  void dropPeers(const std::string& reason, Outcome outcome);
  void failFromAny(const std::string& reason, Outcome outcome);

  Media& media() override { return media_; }
  void log(double start_s, bool is_sent, std::uint32_t peer, const FrameHeader& header) override;
  void onUnexpected(Peer& peer, const MessageKey& key) override;
  bool isExpected(std::uint32_t rank, int lane) override;
  void onConnected(std::unique_ptr<Connection> connection) override;
  void onCallFailed(std::uint32_t rank, const std::string& reason) override;
  void onRefused(std::int64_t rank, const std::string& reason) override;

  EngineOptions options_;
  const int process_;
  std::atomic<std::uint32_t> epoch_;
  std::atomic<std::uint64_t> ids_{0};
  std::atomic<bool> is_closed_{false};

  std::mutex state_;  // for what follows
  Reactor reactor_;
  Dialer dialer_;
  Media media_;
  std::shared_ptr<Buckets> buckets_;  // null without an emulated network
  std::map<std::uint32_t, std::unique_ptr<Peer>> peers_;
  std::map<std::uint64_t, bool> watched_;  // token -> asked for room
  std::vector<Timer> timers_;  // a heap, the earliest first
  std::size_t max_timers_ = 1024;  // when finished ones are swept out
  std::vector<TransferPtr> from_any_;
  std::deque<LoggedFrame> frames_;
  double connect_limit_s_ = 0;
  double last_tick_s_ = 0;
  double planned_wake_s_ = 0;  // when the loop goes on if nothing happens
  EngineStats counters_;
  std::atomic<bool> is_stopping_{false};
  double linger_s_ = 0;  // set before that

  Lead lead_;

  std::mutex mutex_;  // for what follows
  std::condition_variable changed_;
  std::vector<Work> work_;
  bool is_stopped_ = false;  // nobody takes more work
  std::vector<EngineEvent> events_;
  std::map<std::uint32_t, Peer::State> states_;  // how connecting ended

  std::mutex closing_;
  std::thread thread_;
};

}  // namespace dora
