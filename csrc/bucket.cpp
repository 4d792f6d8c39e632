#include "bucket.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <tuple>

namespace dora {

namespace {

constexpr std::uint64_t kBucketMagic = 0x3174656b63754244;  // "DBucket1"
constexpr std::size_t kLine = 64;  // of a cache: what different processes write stays apart

static_assert(std::atomic<double>::is_always_lock_free, "processes share these");
static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "processes share these");

constexpr auto kRelaxed = std::memory_order_relaxed;

// The file at `path` in memory; with a size it is made so long.
std::pair<std::uint8_t*, std::size_t> mapFile(const std::string& path, std::size_t size) {
  int file = ::open(path.c_str(), O_RDWR | O_CLOEXEC | (size > 0 ? O_CREAT : 0), 0600);
  if (file < 0) {
    throw std::invalid_argument("buckets: given " + path + ", which can not be opened (" +
                                std::strerror(errno) + "): has its testbed ended?");
  }
  struct stat status {};
  bool is_sized = (size == 0 || ::ftruncate(file, static_cast<off_t>(size)) == 0) &&
                  ::fstat(file, &status) == 0;
  auto length = static_cast<std::size_t>(status.st_size);
  void* data = MAP_FAILED;
  if (is_sized && length > 0) {
    data = ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  ::close(file);
  if (data == MAP_FAILED) {
    throw std::invalid_argument("buckets: given " + path + ", which is empty or can not be mapped");
  }
  return {static_cast<std::uint8_t*>(data), length};
}

void checkRate(double bytes_per_s) {
  if (bytes_per_s >= 0 && std::isfinite(bytes_per_s)) return;
  throw std::invalid_argument("rate: given " + std::to_string(bytes_per_s) +
                              " bytes/s, allowed: 0 (down) or more");
}

// Returns how many crossings its paths have.
std::uint32_t checkTable(const BucketTable& table) {
  std::size_t num_crossings = 0;
  for (double rate : table.rates) checkRate(rate);
  for (const auto& [pair, media] : table.paths) {
    bool is_known = pair.first < table.num_devices && pair.second < table.num_devices;
    for (std::uint32_t medium : media) is_known = is_known && medium < table.rates.size();
    if (!is_known) throw std::invalid_argument("paths: given an unknown device or medium");
    num_crossings += media.size();
  }
  return static_cast<std::uint32_t>(num_crossings);
}

// Where the path of each pair begins, the end of the last one, then the media of all.
void writePaths(const BucketTable& table, std::uint32_t* begins) {
  std::uint32_t* crossings = begins + std::size_t{table.num_devices} * table.num_devices + 1;
  std::uint32_t count = 0;
  for (std::uint32_t src = 0; src < table.num_devices; ++src) {
    for (std::uint32_t dst = 0; dst < table.num_devices; ++dst) {
      *begins++ = count;
      auto found = table.paths.find({src, dst});
      if (found == table.paths.end()) continue;
      for (std::uint32_t medium : found->second) crossings[count++] = medium;
    }
  }
  *begins = count;
}

}  // namespace

// ------------------------------------------------------------ the file

struct alignas(kLine) Buckets::Head {
  std::atomic<std::uint64_t> magic;  // written last
  std::uint32_t num_devices, num_media, num_crossings;
};

// A stretch of time with one rate.
struct Buckets::Segment {
  std::atomic<double> begin_s, begin_bytes, rate;
};

struct alignas(kLine) Buckets::Medium {
  // Counts changes of rate: segment `number % 2` holds. The next one is written beside it, so that
  // a reader never waits for a writer.
  std::atomic<std::uint64_t> number;
  Segment segments[2];
  alignas(kLine) std::atomic<double> booked_bytes;
  std::atomic<std::uint64_t> carried_bytes;
};

struct alignas(kLine) Buckets::Device {
  std::atomic<std::uint64_t> sent_bytes, received_bytes;
  std::atomic<std::uint32_t> has_joined, is_unplugged;
};

// A segment as it was read.
struct Buckets::Span {
  double begin_s, begin_bytes, rate;

  double bytesAt(double time_s) const {
    return begin_bytes + std::max(0.0, time_s - begin_s) * rate;
  }
  double timeOf(double bytes) const {
    if (rate <= 0) return std::numeric_limits<double>::infinity();
    return begin_s + std::max(0.0, bytes - begin_bytes) / rate;
  }
};

std::size_t Buckets::sizeOf(std::uint32_t devices, std::uint32_t media, std::uint32_t crossings) {
  std::size_t pairs = std::size_t{devices} * devices;
  return sizeof(Head) + devices * sizeof(Device) + media * sizeof(Medium) +
         (pairs + 1 + crossings) * sizeof(std::uint32_t);
}

Buckets::Medium& Buckets::medium(std::uint32_t number) const {
  if (number >= numMedia()) {
    throw std::invalid_argument("medium: given " + std::to_string(number) + ", allowed: less than " +
                                std::to_string(numMedia()));
  }
  auto* first = data_ + sizeof(Head) + numDevices() * sizeof(Device);
  return reinterpret_cast<Medium*>(first)[number];
}

Buckets::Device& Buckets::device(std::uint32_t number) const {
  if (number >= numDevices()) {
    throw std::invalid_argument("device: given " + std::to_string(number) + ", allowed: less than " +
                                std::to_string(numDevices()) + ", as the emulated network has");
  }
  return reinterpret_cast<Device*>(data_ + sizeof(Head))[number];
}

std::uint32_t* Buckets::paths() const {
  auto* first = data_ + sizeof(Head) + numDevices() * sizeof(Device) + numMedia() * sizeof(Medium);
  return reinterpret_cast<std::uint32_t*>(first);
}

std::uint32_t Buckets::numDevices() const { return reinterpret_cast<Head*>(data_)->num_devices; }
std::uint32_t Buckets::numMedia() const { return reinterpret_cast<Head*>(data_)->num_media; }

void Buckets::create(const std::string& path, const BucketTable& table, double now_s) {
  std::uint32_t num_crossings = checkTable(table);
  auto num_media = static_cast<std::uint32_t>(table.rates.size());
  std::size_t size = sizeOf(table.num_devices, num_media, num_crossings);
  std::uint8_t* data = mapFile(path, size).first;
  std::uint8_t* place = data + sizeof(Head);
  for (std::uint32_t i = 0; i < table.num_devices; ++i, place += sizeof(Device)) {
    new (place) Device{};
  }
  for (double rate : table.rates) {
    auto* medium = new (place) Medium{};
    medium->segments[0].begin_s = now_s;
    medium->segments[0].rate = rate;
    place += sizeof(Medium);
  }
  writePaths(table, reinterpret_cast<std::uint32_t*>(place));
  Head* head = new (data) Head{};
  head->num_devices = table.num_devices;
  head->num_media = num_media;
  head->num_crossings = num_crossings;
  head->magic.store(kBucketMagic, std::memory_order_release);
  ::munmap(data, size);
}

Buckets::Buckets(const std::string& path) {
  std::tie(data_, size_) = mapFile(path, 0);
  auto* head = reinterpret_cast<Head*>(data_);
  bool is_whole = size_ >= sizeof(Head) &&
                  head->magic.load(std::memory_order_acquire) == kBucketMagic &&
                  size_ == sizeOf(head->num_devices, head->num_media, head->num_crossings);
  if (is_whole) return;
  ::munmap(data_, size_);
  throw std::invalid_argument("buckets: given " + path + ", allowed: a file that a testbed has made");
}

Buckets::~Buckets() { ::munmap(data_, size_); }

Path Buckets::path(std::uint32_t src, std::uint32_t dst) const {
  device(src);
  device(dst);
  std::size_t num_pairs = std::size_t{numDevices()} * numDevices();
  std::size_t pair = std::size_t{src} * numDevices() + dst;
  const std::uint32_t* begins = paths();
  Path path{src, dst, {}};
  auto& crossings = path.crossings;
  for (std::uint32_t i = begins[pair]; i < begins[pair + 1]; ++i) {
    std::uint32_t number = begins[num_pairs + 1 + i];
    auto known = std::find_if(crossings.begin(), crossings.end(),
                              [&](const auto& crossing) { return crossing.medium == number; });
    if (known == crossings.end()) {
      crossings.push_back({number, 1});
    } else {
      ++known->times;
    }
  }
  return path;
}

// ------------------------------------------------------------ rates

Buckets::Span Buckets::now(const Medium& medium) {
  while (true) {
    std::uint64_t number = medium.number.load(std::memory_order_acquire);
    const Segment& segment = medium.segments[number % 2];
    // Whoever reads what was written for a later change sees that an earlier one has passed.
    Span span{segment.begin_s.load(std::memory_order_acquire),
              segment.begin_bytes.load(std::memory_order_acquire),
              segment.rate.load(std::memory_order_acquire)};
    if (medium.number.load(kRelaxed) == number) return span;
  }
}

void Buckets::setRate(std::uint32_t number, double bytes_per_s, double now_s) {
  checkRate(bytes_per_s);
  std::lock_guard<std::mutex> lock(setting_);
  Medium& changed = medium(number);
  Span before = now(changed);
  std::uint64_t next = changed.number.load(kRelaxed) + 1;
  Segment& segment = changed.segments[next % 2];
  segment.begin_s.store(now_s, std::memory_order_release);
  segment.begin_bytes.store(before.bytesAt(now_s), std::memory_order_release);
  segment.rate.store(bytes_per_s, std::memory_order_release);
  changed.number.store(next, std::memory_order_release);
}

double Buckets::rate(std::uint32_t number) const { return now(medium(number)).rate; }

void Buckets::setConnected(std::uint32_t number, bool is_connected) {
  device(number).is_unplugged.store(is_connected ? 0 : 1, kRelaxed);
}

bool Buckets::isDown(const Path& path) const {
  if (device(path.src).is_unplugged.load(kRelaxed) != 0) return true;
  if (device(path.dst).is_unplugged.load(kRelaxed) != 0) return true;
  return std::any_of(path.crossings.begin(), path.crossings.end(),
                     [&](const auto& crossing) { return rate(crossing.medium) <= 0; });
}

// ------------------------------------------------------------ bookings

void Buckets::book(const Path& path, std::uint64_t num_bytes, double since_s, Booking& booking) {
  booking.parts.clear();
  for (const auto& crossing : path.crossings) {
    Medium& crossed = medium(crossing.medium);
    double length = static_cast<double>(num_bytes) * crossing.times;
    double free_bytes = now(crossed).bytesAt(since_s);
    double booked = crossed.booked_bytes.load(kRelaxed);
    double begin;
    do {
      begin = std::max(booked, free_bytes);
    } while (!crossed.booked_bytes.compare_exchange_weak(booked, begin + length, kRelaxed));
    booking.parts.push_back({crossing.medium, begin, begin + length});
  }
}

std::pair<double, double> Buckets::passes(const Booking& booking) const {
  double end_s = 0, begin_s = 0;
  for (const Booking::Part& part : booking.parts) {
    Span span = now(medium(part.medium));
    double passed_s = span.timeOf(part.end_bytes);
    if (passed_s < end_s) continue;
    end_s = passed_s;
    begin_s = span.timeOf(part.begin_bytes);
  }
  return {end_s, begin_s};
}

// ------------------------------------------------------------ counters

void Buckets::onJoined(std::uint32_t number) { device(number).has_joined.store(1, kRelaxed); }

bool Buckets::hasJoined(std::uint32_t number) const {
  return device(number).has_joined.load(kRelaxed) != 0;
}

void Buckets::onSent(const Path& path, std::uint64_t num_bytes) {
  device(path.src).sent_bytes.fetch_add(num_bytes, kRelaxed);
  for (const auto& crossing : path.crossings) {
    medium(crossing.medium).carried_bytes.fetch_add(num_bytes * crossing.times, kRelaxed);
  }
}

void Buckets::onReceived(std::uint32_t number, std::uint64_t num_bytes) {
  device(number).received_bytes.fetch_add(num_bytes, kRelaxed);
}

std::uint64_t Buckets::carriedBytes(std::uint32_t number) const {
  return medium(number).carried_bytes.load(kRelaxed);
}

std::uint64_t Buckets::sentBytes(std::uint32_t number) const {
  return device(number).sent_bytes.load(kRelaxed);
}

std::uint64_t Buckets::receivedBytes(std::uint32_t number) const {
  return device(number).received_bytes.load(kRelaxed);
}

}  // namespace dora
