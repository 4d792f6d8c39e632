// The only file that knows the operating system: epoll, eventfd, TCP sockets and their options.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "send_queue.h"

namespace dora {

// Seconds of the monotonic clock, the one behind Python's time.perf_counter().
double nowS();

// Lets the calling thread wake up when it is time, not up to 50 us later.
void wakePunctually();

// Seconds since 1970.
double wallClockS();

// The connection is gone; the text says how.
struct ConnectionLost : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A non-blocking TCP socket.
class Socket {
 public:
  struct Piece {
    const void* data;
    std::size_t size;
  };
  struct Room {
    void* data;
    std::size_t size;
  };

  // Throws std::invalid_argument for a bad address, std::runtime_error if it is taken.
  static Socket listen(const std::string& host, std::uint16_t port);
  // Starts connecting; `checkConnected` tells the result once the socket is writable.
  static Socket connect(const std::string& host, std::uint16_t port);

  Socket(Socket&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  Socket& operator=(Socket&& other) noexcept;
  ~Socket();

  std::optional<Socket> accept();
  std::uint16_t port() const;
  std::string peerName() const;

  // Throws ConnectionLost if connecting has failed.
  void checkConnected();

  // How many bytes went; fewer than given when the socket is full. Throws ConnectionLost.
  std::size_t write(const Piece* pieces, int num_pieces);
  // How many bytes came; 0 when there is nothing now. Throws ConnectionLost, also at the end.
  std::size_t read(const Room* rooms, int num_rooms);
  // The other side reads an end after what was written.
  void endWriting();

  // No delay for small frames; the kernel gives up on unacknowledged data after `dead_s`.
  void configure(double dead_s);
  // The socket counts as full when so many bytes wait unsent in the kernel: later, more urgent
  // data need not queue behind them.
  void setUnsentLimit(std::size_t num_bytes);
  // The socket counts as readable when so many bytes have come, or nothing more will.
  void setReadLimit(std::size_t num_bytes);
  void setPace(double bytes_per_s);  // 0: no limit
  std::size_t segmentBytes() const;  // of TCP: what leaves in one piece, however slow the pace
  // How much longer the latest round trips took than the shortest one: what waits in the network.
  double queueingS() const;
  void setTrafficClass(std::uint8_t traffic_class);  // DSCP, see RFC 8325 for Wi-Fi

  int fd() const { return fd_; }

 private:
  explicit Socket(int fd) : fd_(fd) {}
  int fd_;
};

// Waits for sockets and for other threads.
//
// Thread safety: `wake` from any thread; `wait` from one at a time; the rest under the owner's lock.
class Reactor {
 public:
  struct Event {
    std::uint64_t token;
    bool is_readable;
    bool is_writable;
  };

  Reactor();
  ~Reactor();
  Reactor(const Reactor&) = delete;
  Reactor& operator=(const Reactor&) = delete;

  void add(const Socket& socket, std::uint64_t token, bool wants_write);
  void change(const Socket& socket, std::uint64_t token, bool wants_write);
  void remove(const Socket& socket);

  // Blocks until a socket is ready, `wake` was called or `timeout_s` has passed.
  const std::vector<Event>& wait(double timeout_s);
  void wake();

 private:
  int epoll_;
  int event_;
  std::vector<Event> events_;
};

}  // namespace dora
