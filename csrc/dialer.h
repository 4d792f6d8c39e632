// Makes authenticated connections: listens, calls, retries and refuses.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "transfer.h"

namespace dora {

struct PeerAddress {
  std::string host;
  std::uint16_t port = 0;
};

// What a dialer tells its owner.
class DialerOwner {
 public:
  virtual ~DialerOwner() = default;
  // May this rank call now? A rank that is not expected (yet) is refused and calls again.
  virtual bool isExpected(std::uint32_t rank, int lane) = 0;
  virtual void onConnected(std::unique_ptr<Connection> connection) = 0;
  // A call that can not succeed: other key, version, job or protection.
  virtual void onCallFailed(std::uint32_t rank, const std::string& reason) = 0;
  // Somebody called and was refused, or did not speak the protocol.
  virtual void onRefused(std::int64_t rank, const std::string& reason) = 0;
};

// Connections until they are authenticated.
//
// Strangers get little: at most kMaxStrangers at a time, a few seconds each, fixed-size messages.
// Thread safety: none; whoever holds the engine's state.
class Dialer {
 public:
  // Tokens of the reactor from here on are the dialer's.
  static constexpr std::uint64_t kFirstToken = std::uint64_t{1} << 40;
  static constexpr std::size_t kMaxStrangers = 64;

  Dialer(const EngineOptions& options, Reactor& reactor, DialerOwner& owner);

  std::uint16_t port() const { return port_; }
  void call(std::uint32_t rank, int lane, const PeerAddress& address, double now_s);
  // Drops all calls and callers; in the next epoch others are let in.
  void reset();
  void stop();  // no more callers

  void onEvent(const Reactor::Event& event, double now_s);
  void tick(double now_s);
  // The latest reason why a rank could not be reached.
  std::string lastProblem(std::uint32_t rank) const;

 private:
  struct Call {
    std::uint32_t rank;
    int lane;
    PeerAddress address;
    double next_s;
    double backoff_s;
  };
  struct Pending {
    std::unique_ptr<Connection> connection;
    std::unique_ptr<Call> call;  // null for somebody who called us
    bool is_connected;
    bool is_checked;
    double limit_s;
  };
  using Pendings = std::map<std::uint64_t, Pending>;

  Identity identity(int lane) const;
  void dial(std::unique_ptr<Call> call, double now_s);
  void acceptAll(double now_s);
  void add(Pending pending);
  void retry(std::unique_ptr<Call> call, const std::string& problem, double now_s);
  void advance(Pendings::iterator pending, const Reactor::Event& event);
  void end(Pendings::iterator pending);

  const EngineOptions& options_;
  Reactor& reactor_;
  DialerOwner& owner_;
  std::unique_ptr<Socket> listener_;
  std::uint16_t port_ = 0;
  std::uint64_t next_token_ = kFirstToken + 1;
  Pendings pending_;
  std::vector<std::unique_ptr<Call>> waiting_;
  std::map<std::uint32_t, std::string> problems_;
};

}  // namespace dora
