#include "ring.h"

#include <algorithm>
#include <cstring>

namespace dora {

namespace {

using Bytes = std::uint8_t;

// Up to here one round trip counts for more than the bytes that a ring saves.
constexpr std::uint64_t kDirectBytes = 64 * 1024;
// What travels at once: a few chunks of the fastest link, a fraction of a second on the slowest.
constexpr std::uint64_t kSegmentBytes = 512 * 1024;
constexpr std::size_t kMaxSlices = 64;

struct Range {
  std::size_t begin;
  std::size_t count;
};

// Part i when `count` is divided into `num_parts`, the first ones longer by one at most.
Range part(std::size_t count, std::size_t num_parts, std::size_t i) {
  const std::size_t rest = count % num_parts;
  return {count / num_parts * i + std::min(i, rest), count / num_parts + (i < rest ? 1 : 0)};
}

std::size_t divideUp(std::uint64_t a, std::uint64_t b) {
  return static_cast<std::size_t>(a / b + (a % b != 0 ? 1 : 0));
}

// An empty tensor may have no address, which memmove does not allow.
void copy(void* to, const void* from, std::size_t num_bytes) {
  if (num_bytes > 0) std::memmove(to, from, num_bytes);
}

// Memory that is not cleared first.
std::shared_ptr<Bytes> allocate(std::size_t num_bytes) {
  return std::shared_ptr<Bytes>(new Bytes[num_bytes], std::default_delete<Bytes[]>());
}

// One slice on its way round the ring; it frees itself when its last message is finished.
//
// Reduce-scatter, then (for an all-reduce) all-gather, in size - 1 steps each. Member m always
// sends to m + 1. What it sends for three members:
//
//                     member 0       member 1       member 2
//   reduce   step 0   s2: x0         s0: x1         s1: x2
//            step 1   s1: x2+x0      s2: x0+x1      s0: x1+x2
//   it has            s0: x1+x2+x0   s1: x2+x0+x1   s2: x0+x1+x2
//   gather   step 0   s0             s1             s2
//            step 1   s2             s0             s1
//
// Incoming segments of the reduction go to scratch buffers, where the own operand is added, and
// leave from there; so the input is only read, and up to three steps can be received ahead.
class RingSlice : public std::enable_shared_from_this<RingSlice> {
 public:
  // `ranges`: the segments in `input`, in elements; `gathered`: where all results go, at the same
  // ranges, or null.
  RingSlice(Exchange& exchange, std::uint32_t slice, const Bytes* input, std::vector<Range> ranges,
            Bytes* result, Bytes* gathered, Reduction reduction)
      : exchange_(exchange),
        slice_(slice),
        input_(input),
        ranges_(std::move(ranges)),
        result_(result),
        gathered_(gathered),
        reduction_(reduction),
        element_bytes_(sizeOf(reduction.type)),
        num_steps_(static_cast<std::uint32_t>(exchange.size() - 1)),
        num_buffers_(std::min(num_steps_, kMaxAhead)) {
    for (const Range& range : ranges_) buffer_elements_ = std::max(buffer_elements_, range.count);
    scratch_ = allocate(num_buffers_ * buffer_elements_ * element_bytes_);
  }

  void start() {
    for (std::uint32_t step = 0; step < num_buffers_; ++step) receivePartial(step);
    const Range& first = segment(-1);
    exchange_.send(in(input_, first), bytes(first), exchange_.at(1), {slice_, 0},
                   [self = shared_from_this()] { self->receiveGathered(0); });
  }

 private:
  static constexpr std::uint32_t kMaxAhead = 3;

  void receivePartial(std::uint32_t step) {
    const Range& range = segment(-2 - static_cast<std::ptrdiff_t>(step));
    exchange_.receive(buffer(step), bytes(range), exchange_.at(-1), {slice_, step},
                      [self = shared_from_this(), step] { self->combine(step); });
  }

  void combine(std::uint32_t step) {
    const Range& range = segment(-2 - static_cast<std::ptrdiff_t>(step));
    if (!exchange_.hasFailed()) {
      reduceInto(buffer(step), in(input_, range), range.count, reduction_.type, reduction_.op);
    }
    if (step + 1 < num_steps_) {
      sendPartial(step + 1);
      receiveGathered(step + 1);
    } else {
      copy(result_, buffer(step), bytes(range));
      sendGathered(0);
    }
  }

  // What was combined in the step before; its buffer is free again when it has left.
  void sendPartial(std::uint32_t step) {
    exchange_.send(buffer(step - 1), bytes(segment(-1 - static_cast<std::ptrdiff_t>(step))),
                   exchange_.at(1), {slice_, step}, [self = shared_from_this(), step] {
                     const std::uint32_t next = step - 1 + self->num_buffers_;
                     if (next < self->num_steps_) self->receivePartial(next);
                   });
  }

  // Posted as soon as the input that it overwrites has been read for the last time: that of
  // step 0 when it has been sent, that of step k when it was combined in step k - 1.
  void receiveGathered(std::uint32_t step) {
    if (gathered_ == nullptr) return;
    const Range& range = segment(-1 - static_cast<std::ptrdiff_t>(step));
    exchange_.receive(in(gathered_, range), bytes(range), exchange_.at(-1),
                      {slice_, num_steps_ + step}, [self = shared_from_this(), step] {
                        if (step + 1 < self->num_steps_) self->sendGathered(step + 1);
                      });
  }

  void sendGathered(std::uint32_t step) {
    if (gathered_ == nullptr) return;
    const Range& range = segment(-static_cast<std::ptrdiff_t>(step));
    exchange_.send(in(gathered_, range), bytes(range), exchange_.at(1),
                   {slice_, num_steps_ + step}, [self = shared_from_this()] {});
  }

  const Range& segment(std::ptrdiff_t distance) const { return ranges_[exchange_.at(distance)]; }
  std::size_t bytes(const Range& range) const { return range.count * element_bytes_; }
  template <typename T>
  T* in(T* data, const Range& range) const {
    return data + range.begin * element_bytes_;
  }
  Bytes* buffer(std::uint32_t step) const {
    return scratch_.get() + step % num_buffers_ * buffer_elements_ * element_bytes_;
  }

  Exchange& exchange_;
  const std::uint32_t slice_;
  const Bytes* const input_;
  const std::vector<Range> ranges_;
  Bytes* const result_;
  Bytes* const gathered_;
  const Reduction reduction_;
  const std::size_t element_bytes_;
  const std::uint32_t num_steps_;
  const std::uint32_t num_buffers_;
  std::size_t buffer_elements_ = 0;
  std::shared_ptr<Bytes> scratch_;
};

// Member i is sent the `num_bytes` at i * stride of `input`; each member reduces what it gets in
// team order.
void reduceDirect(Exchange& exchange, const Bytes* input, std::size_t stride, void* output,
                  std::size_t count, Reduction reduction) {
  const std::size_t num_bytes = count * sizeOf(reduction.type);
  const auto operands = allocate(exchange.size() * num_bytes);
  for (std::size_t i = 0; i < exchange.size(); ++i) {
    Bytes* operand = operands.get() + i * num_bytes;
    if (i == exchange.index()) {
      copy(operand, input + i * stride, num_bytes);
    } else {
      exchange.receive(operand, num_bytes, i, {0, 0});
      exchange.send(input + i * stride, num_bytes, i, {0, 0});
    }
  }
  exchange.atEnd([=, &exchange] {
    copy(output, operands.get(), num_bytes);
    for (std::size_t i = 1; i < exchange.size(); ++i) {
      reduceInto(output, operands.get() + i * num_bytes, count, reduction.type, reduction.op);
    }
  });
}

std::size_t numSlices(std::uint64_t segment_bytes) {
  return std::clamp<std::size_t>(divideUp(segment_bytes, kSegmentBytes), 1, kMaxSlices);
}

}  // namespace

void allReduce(Exchange& exchange, void* data, std::size_t count, Reduction reduction,
               double share) {
  const std::size_t size = exchange.size();
  const std::size_t element_bytes = sizeOf(reduction.type);
  auto* const all = static_cast<Bytes*>(data);
  if (size == 1 || count * element_bytes <= kDirectBytes) {
    scale(data, count, reduction.type, share);
    if (size > 1) reduceDirect(exchange, all, 0, data, count, reduction);
    return;
  }
  const std::size_t num_slices = numSlices(divideUp(count * element_bytes, size));
  for (std::size_t i = 0; i < num_slices; ++i) {
    const Range slice = part(count, num_slices, i);
    std::vector<Range> ranges;
    for (std::size_t member = 0; member < size; ++member) {
      const Range range = part(slice.count, size, member);
      ranges.push_back({slice.begin + range.begin, range.count});
    }
    // Slice by slice: the first one travels while the next one is scaled.
    scale(all + slice.begin * element_bytes, slice.count, reduction.type, share);
    Bytes* const result = all + ranges[exchange.index()].begin * element_bytes;
    std::make_shared<RingSlice>(exchange, static_cast<std::uint32_t>(i), all, std::move(ranges),
                                result, all, reduction)
        ->start();
  }
}

void reduceScatter(Exchange& exchange, const void* input, void* output, std::size_t count,
                   Reduction reduction) {
  const std::size_t size = exchange.size();
  const std::size_t element_bytes = sizeOf(reduction.type);
  const auto* const all = static_cast<const Bytes*>(input);
  if (size == 1) return copy(output, input, count * element_bytes);
  if (count * element_bytes <= kDirectBytes) {
    return reduceDirect(exchange, all, count * element_bytes, output, count, reduction);
  }
  const std::size_t num_slices = numSlices(count * element_bytes);
  for (std::size_t i = 0; i < num_slices; ++i) {
    const Range slice = part(count, num_slices, i);
    std::vector<Range> ranges;
    for (std::size_t member = 0; member < size; ++member) {
      ranges.push_back({member * count + slice.begin, slice.count});
    }
    Bytes* const result = static_cast<Bytes*>(output) + slice.begin * element_bytes;
    std::make_shared<RingSlice>(exchange, static_cast<std::uint32_t>(i), all, std::move(ranges),
                                result, nullptr, reduction)
        ->start();
  }
}

void allGather(Exchange& exchange, const void* input, void* output, std::uint64_t num_bytes) {
  auto* const all = static_cast<Bytes*>(output);
  Bytes* const own = all + exchange.index() * num_bytes;
  if (own != input) copy(own, input, num_bytes);
  for (std::size_t i = 0; i < exchange.size(); ++i) {
    if (i == exchange.index()) continue;
    exchange.receive(all + i * num_bytes, num_bytes, i, {0, 0});
    exchange.send(own, num_bytes, i, {0, 0});
  }
}

namespace {

void broadcastDirect(Exchange& exchange, void* data, std::uint64_t num_bytes, std::size_t root) {
  if (exchange.index() != root) return exchange.receive(data, num_bytes, root, {0, 0});
  for (std::size_t i = 0; i < exchange.size(); ++i) {
    if (i != root) exchange.send(data, num_bytes, i, {0, 0});
  }
}

// root -> root + 1 -> ... -> root - 1, each slice passed on as soon as it has arrived.
void broadcastChain(Exchange& exchange, Bytes* data, std::uint64_t num_bytes, std::size_t root) {
  const std::size_t num_slices = divideUp(num_bytes, kSegmentBytes);
  for (std::size_t i = 0; i < num_slices; ++i) {
    Bytes* const slice = data + i * kSegmentBytes;
    const std::uint64_t slice_bytes = std::min(kSegmentBytes, num_bytes - i * kSegmentBytes);
    const Exchange::Slot slot{static_cast<std::uint32_t>(i), 0};
    const auto pass_on = [=, &exchange] {
      if (exchange.at(1) != root) exchange.send(slice, slice_bytes, exchange.at(1), slot);
    };
    if (exchange.index() == root) {
      pass_on();
    } else {
      exchange.receive(slice, slice_bytes, exchange.at(-1), slot, pass_on);
    }
  }
}

// After round k everybody has heard, directly or not, of the 2^(k+1) members before it.
void disseminate(Exchange& exchange, std::uint32_t round) {
  const std::ptrdiff_t distance = std::ptrdiff_t{1} << round;
  if (distance >= static_cast<std::ptrdiff_t>(exchange.size())) return;
  exchange.send(nullptr, 0, exchange.at(distance), {0, round});
  exchange.receive(nullptr, 0, exchange.at(-distance), {0, round},
                   [&exchange, round] { disseminate(exchange, round + 1); });
}

}  // namespace

void broadcast(Exchange& exchange, void* data, std::uint64_t num_bytes, std::size_t root) {
  if (num_bytes <= kDirectBytes || exchange.size() <= 2) {
    broadcastDirect(exchange, data, num_bytes, root);
  } else {
    broadcastChain(exchange, static_cast<Bytes*>(data), num_bytes, root);
  }
}

// Hensgen, Finkel and Manber, "Two algorithms for barrier synchronization", 1988.
void barrier(Exchange& exchange) { disseminate(exchange, 0); }

}  // namespace dora
