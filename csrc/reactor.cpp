#include "reactor.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace dora {

namespace {

constexpr std::uint64_t kWakeToken = ~std::uint64_t{0};
constexpr int kMaxPieces = 8;

// epoll counts in milliseconds, which is long for what is due within a few.
constexpr double kFineS = 0.005;

double seconds(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(what + ": " + std::strerror(errno));
}

template <typename Value>
void setOption(int fd, int level, int name, Value value) {
  // Advice to the kernel: a system without the option works, only less well.
  (void)::setsockopt(fd, level, name, &value, sizeof value);
}

struct Address {
  sockaddr_storage storage{};
  socklen_t size = 0;
  int family() const { return storage.ss_family; }
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
};

Address parse(const std::string& host, std::uint16_t port) {
  Address address;
  auto* v4 = reinterpret_cast<sockaddr_in*>(&address.storage);
  auto* v6 = reinterpret_cast<sockaddr_in6*>(&address.storage);
  if (inet_pton(AF_INET, host.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(port);
    address.size = sizeof *v4;
  } else if (inet_pton(AF_INET6, host.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(port);
    address.size = sizeof *v6;
  } else {
    throw std::invalid_argument("host: given '" + host + "', allowed: a numeric IP address");
  }
  return address;
}

bool wouldBlock() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

constexpr const char* kClosed =
    "the connection was closed; that process has failed or was killed";

[[noreturn]] void lose() {
  if (errno == ECONNRESET || errno == EPIPE) throw ConnectionLost(kClosed);
  throw ConnectionLost(std::string("the connection broke: ") + std::strerror(errno));
}

}  // namespace

double nowS() { return seconds(CLOCK_MONOTONIC); }
void wakePunctually() { (void)::prctl(PR_SET_TIMERSLACK, 1UL); }
double wallClockS() { return seconds(CLOCK_REALTIME); }

// ------------------------------------------------------------ Socket

Socket Socket::listen(const std::string& host, std::uint16_t port) {
  Address address = parse(host, port);
  Socket socket(::socket(address.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (socket.fd_ < 0) fail("socket");
  setOption(socket.fd_, SOL_SOCKET, SO_REUSEADDR, 1);
  if (::bind(socket.fd_, address.get(), address.size) < 0 || ::listen(socket.fd_, 128) < 0) {
    fail("listening on " + host + " port " + std::to_string(port));
  }
  return socket;
}

Socket Socket::connect(const std::string& host, std::uint16_t port) {
  Address address = parse(host, port);
  Socket socket(::socket(address.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (socket.fd_ < 0) fail("socket");
  if (::connect(socket.fd_, address.get(), address.size) < 0 && errno != EINPROGRESS) lose();
  return socket;
}

Socket& Socket::operator=(Socket&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

Socket::~Socket() {
  if (fd_ >= 0) ::close(fd_);
}

std::optional<Socket> Socket::accept() {
  int fd = ::accept4(fd_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (fd < 0) return std::nullopt;
  return Socket(fd);
}

std::uint16_t Socket::port() const {
  Address address;
  address.size = sizeof address.storage;
  if (::getsockname(fd_, address.get(), &address.size) < 0) fail("getsockname");
  const void* raw = &address.storage;
  return ntohs(address.family() == AF_INET6 ? static_cast<const sockaddr_in6*>(raw)->sin6_port
                                            : static_cast<const sockaddr_in*>(raw)->sin_port);
}

std::string Socket::peerName() const {
  Address address;
  address.size = sizeof address.storage;
  if (::getpeername(fd_, address.get(), &address.size) < 0) return "unknown";
  char text[INET6_ADDRSTRLEN] = "";
  const void* raw = &address.storage;
  const void* host = address.family() == AF_INET6
                         ? static_cast<const void*>(&static_cast<const sockaddr_in6*>(raw)->sin6_addr)
                         : &static_cast<const sockaddr_in*>(raw)->sin_addr;
  inet_ntop(address.family(), host, text, sizeof text);
  return text;
}

void Socket::checkConnected() {
  int error = 0;
  socklen_t size = sizeof error;
  ::getsockopt(fd_, SOL_SOCKET, SO_ERROR, &error, &size);
  if (error != 0) throw ConnectionLost(std::strerror(error));
}

std::size_t Socket::write(const Piece* pieces, int num_pieces) {
  std::array<iovec, kMaxPieces> parts;
  for (int i = 0; i < num_pieces; ++i) {
    parts[i] = {const_cast<void*>(pieces[i].data), pieces[i].size};
  }
  msghdr message{};
  message.msg_iov = parts.data();
  message.msg_iovlen = static_cast<std::size_t>(num_pieces);
  ssize_t count = ::sendmsg(fd_, &message, MSG_NOSIGNAL);
  if (count >= 0) return static_cast<std::size_t>(count);
  if (wouldBlock()) return 0;
  lose();
}

std::size_t Socket::read(const Room* rooms, int num_rooms) {
  std::array<iovec, kMaxPieces> parts;
  for (int i = 0; i < num_rooms; ++i) parts[i] = {rooms[i].data, rooms[i].size};
  ssize_t count = ::readv(fd_, parts.data(), num_rooms);
  if (count > 0) return static_cast<std::size_t>(count);
  if (count < 0 && wouldBlock()) return 0;
  if (count == 0) throw ConnectionLost(kClosed);
  lose();
}

void Socket::endWriting() { (void)::shutdown(fd_, SHUT_WR); }

void Socket::configure(double dead_s) {
  setOption(fd_, IPPROTO_TCP, TCP_NODELAY, 1);
  setOption(fd_, IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<unsigned>(dead_s * 1e3));
}

void Socket::setUnsentLimit(std::size_t num_bytes) {
  setOption(fd_, IPPROTO_TCP, TCP_NOTSENT_LOWAT, static_cast<int>(num_bytes));
}

void Socket::setReadLimit(std::size_t num_bytes) {
  setOption(fd_, SOL_SOCKET, SO_RCVLOWAT, static_cast<int>(num_bytes));
}

void Socket::setPace(double bytes_per_s) {
  std::uint64_t rate = bytes_per_s > 0 ? static_cast<std::uint64_t>(bytes_per_s) : ~0ull;
  setOption(fd_, SOL_SOCKET, SO_MAX_PACING_RATE, rate);
}

std::size_t Socket::segmentBytes() const {
  int num_bytes = 0;
  socklen_t size = sizeof num_bytes;
  ::getsockopt(fd_, IPPROTO_TCP, TCP_MAXSEG, &num_bytes, &size);
  return static_cast<std::size_t>(num_bytes);
}

double Socket::queueingS() const {
  // The kernel's own structure is longer, and the libc's one has no tcpi_min_rtt.
  struct {
    tcp_info begin;
    std::uint8_t rest[256];
  } info{};
  constexpr std::size_t kMinRttOffset = 148;  // of tcpi_min_rtt since Linux 4.6
  socklen_t size = sizeof info;
  if (::getsockopt(fd_, IPPROTO_TCP, TCP_INFO, &info, &size) < 0) return 0;
  if (size < kMinRttOffset + sizeof(std::uint32_t)) return 0;
  std::uint32_t min_rtt_us;
  std::memcpy(&min_rtt_us, reinterpret_cast<const std::uint8_t*>(&info) + kMinRttOffset,
              sizeof min_rtt_us);
  return info.begin.tcpi_rtt > min_rtt_us ? 1e-6 * (info.begin.tcpi_rtt - min_rtt_us) : 0;
}

void Socket::setTrafficClass(std::uint8_t traffic_class) {
  // Access points sort by the upper three bits: voice, voice, video, best effort, background.
  constexpr std::array<int, kNumClasses> kDscp = {46, 46, 34, 0, 8};  // EF EF AF41 CS0 CS1
  int field = kDscp[traffic_class] << 2;
  setOption(fd_, IPPROTO_IP, IP_TOS, field);
  setOption(fd_, IPPROTO_IPV6, IPV6_TCLASS, field);
}

// ------------------------------------------------------------ Reactor

Reactor::Reactor() : epoll_(::epoll_create1(EPOLL_CLOEXEC)), event_(-1) {
  event_ = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (epoll_ < 0 || event_ < 0) fail("epoll");
  epoll_event event{};
  event.events = EPOLLIN | EPOLLET;  // an edge per wake; the counter is never read
  event.data.u64 = kWakeToken;
  ::epoll_ctl(epoll_, EPOLL_CTL_ADD, event_, &event);
}

Reactor::~Reactor() {
  ::close(event_);
  ::close(epoll_);
}

void Reactor::add(const Socket& socket, std::uint64_t token, bool wants_write) {
  epoll_event event{};
  event.events = EPOLLIN | EPOLLRDHUP | (wants_write ? EPOLLOUT : 0u);
  event.data.u64 = token;
  if (::epoll_ctl(epoll_, EPOLL_CTL_ADD, socket.fd(), &event) < 0) fail("epoll_ctl");
}

void Reactor::change(const Socket& socket, std::uint64_t token, bool wants_write) {
  epoll_event event{};
  event.events = EPOLLIN | EPOLLRDHUP | (wants_write ? EPOLLOUT : 0u);
  event.data.u64 = token;
  ::epoll_ctl(epoll_, EPOLL_CTL_MOD, socket.fd(), &event);
}

void Reactor::remove(const Socket& socket) {
  ::epoll_ctl(epoll_, EPOLL_CTL_DEL, socket.fd(), nullptr);
}

const std::vector<Reactor::Event>& Reactor::wait(double timeout_s) {
  std::array<epoll_event, 64> ready;
  if (timeout_s > 0 && timeout_s < kFineS) {
    pollfd any{epoll_, POLLIN, 0};
    timespec time{0, static_cast<long>(timeout_s * 1e9)};
    (void)::ppoll(&any, 1, &time, nullptr);
    timeout_s = 0;
  }
  int timeout_ms = static_cast<int>(std::ceil(timeout_s * 1e3));
  // A signal counts as an event: else one that comes often would keep timers from running.
  int count = ::epoll_wait(epoll_, ready.data(), static_cast<int>(ready.size()), timeout_ms);
  events_.clear();
  for (int i = 0; i < count; ++i) {
    if (ready[i].data.u64 == kWakeToken) continue;
    bool is_broken = (ready[i].events & (EPOLLERR | EPOLLHUP | EPOLLRDHUP)) != 0;
    events_.push_back({ready[i].data.u64, is_broken || (ready[i].events & EPOLLIN) != 0,
                       (ready[i].events & EPOLLOUT) != 0});
  }
  return events_;
}

void Reactor::wake() {
  std::uint64_t one = 1;
  (void)!::write(event_, &one, sizeof one);
}

}  // namespace dora
