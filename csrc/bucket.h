// Media of an emulated network: a file that all processes of one machine map, with how much every
// medium has carried, carries per second and has promised to carry. std and mmap; time is an
// argument.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace dora {

// The media between two devices, each with how often they are crossed.
struct Path {
  struct Crossing {
    std::uint32_t medium;
    std::uint32_t times;
  };
  std::uint32_t src = 0, dst = 0;
  std::vector<Crossing> crossings;
};

struct BucketTable {
  std::uint32_t num_devices = 0;
  std::vector<double> rates;  // of the media, in bytes/s
  // (from, to) -> media in the order crossed, as often as crossed; pairs without are not limited.
  std::map<std::pair<std::uint32_t, std::uint32_t>, std::vector<std::uint32_t>> paths;
};

// A place in the media of a path: from where to where on each, in bytes since its start.
struct Booking {
  struct Part {
    std::uint32_t medium;
    double begin_bytes, end_bytes;
  };
  std::vector<Part> parts;
};

// The media of an emulated network and the counters of its devices.
//
// A medium has a position, the bytes it could have carried so far, which grows at its rate and
// stands still at rate 0, and the end of what is booked on it. A booking is [begin, end) behind
// that; its bytes have passed when the position reaches its end. So a change of rate also holds for
// what is booked already. (A virtual clock, see Zhang, "VirtualClock: A New Traffic Control
// Algorithm for Packet Switching Networks", SIGCOMM 1990, that counts bytes instead of seconds.)
//
// There are no locks: a process that is killed leaves at most one unused booking behind.
// Thread safety: all methods, from all processes; `setRate` in one process only.
class Buckets {
 public:
  // Lays out the file at `path`; throws std::invalid_argument, std::runtime_error.
  static void create(const std::string& path, const BucketTable& table, double now_s);

  // Maps the file; throws std::invalid_argument if it is no such file.
  explicit Buckets(const std::string& path);
  ~Buckets();
  Buckets(const Buckets&) = delete;
  Buckets& operator=(const Buckets&) = delete;

  std::uint32_t numDevices() const;
  std::uint32_t numMedia() const;
  Path path(std::uint32_t src, std::uint32_t dst) const;

  void setRate(std::uint32_t medium, double bytes_per_s, double now_s);
  double rate(std::uint32_t medium) const;
  // Plugs the cable of a device in or out.
  void setConnected(std::uint32_t device, bool is_connected);
  // Nothing passes: a medium has rate 0, or an end is unplugged.
  bool isDown(const Path& path) const;

  // Books `num_bytes` on all media of a path, once per crossing. `since_s`: since when its sender
  // could have sent them; at most now. What nobody has used of a medium before then is lost.
  void book(const Path& path, std::uint64_t num_bytes, double since_s, Booking& booking);
  // When its bytes will have passed all media, and when they began to pass the last of these;
  // infinite while a medium is down.
  std::pair<double, double> passes(const Booking& booking) const;

  // Notes that a device has reached another one, and bytes that have left and arrived.
  void onJoined(std::uint32_t device);
  void onSent(const Path& path, std::uint64_t num_bytes);
  void onReceived(std::uint32_t device, std::uint64_t num_bytes);

  bool hasJoined(std::uint32_t device) const;

  std::uint64_t carriedBytes(std::uint32_t medium) const;  // a crossing counts as such
  std::uint64_t sentBytes(std::uint32_t device) const;
  std::uint64_t receivedBytes(std::uint32_t device) const;

 private:
  struct Head;
  struct Segment;
  struct Medium;
  struct Device;
  struct Span;

  static std::size_t sizeOf(std::uint32_t devices, std::uint32_t media, std::uint32_t crossings);
  Medium& medium(std::uint32_t number) const;
  Device& device(std::uint32_t number) const;
  std::uint32_t* paths() const;
  static Span now(const Medium& medium);

  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
  std::mutex setting_;
};

}  // namespace dora
