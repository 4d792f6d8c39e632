// The order in which messages to one peer leave: strict priority at chunk granularity.
//
// std only, no clock: time is an argument, so that the engine, the gloo and NCCL transports, the
// tests and the simulator use the same code.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <tuple>
#include <unordered_map>

namespace dora {

constexpr std::uint8_t kNumClasses = 5;
constexpr std::uint64_t kMaxUnitBytes = 16 * 1024;  // the smallest chunk of a link holds one

enum TrafficClass : std::uint8_t {
  kControl = 0,     // the engine's own messages
  kUrgent = 1,      // tokens, losses, small activations that a user waits for
  kActivation = 2,  // activations and their gradients
  kGradient = 3,    // gradient buckets
  kWeights = 4,     // parameters, checkpoints, migration
};

// Lower goes first; deadlines are comparable numbers, such as the consumer's start time in the
// plan, in seconds.
struct Priority {
  std::uint8_t traffic_class = kActivation;
  double deadline = 0;
  // Chunks end at multiples of it, so that whole units arrive; it stays as it was posted.
  std::uint64_t unit_bytes = 1;
};

struct QueueStats {
  std::array<std::uint64_t, kNumClasses> messages{};  // started, by the class they were posted in
  std::array<std::uint64_t, kNumClasses> bytes{};     // handed out
  std::array<double, kNumClasses> queue_s{};          // from post to first chunk, summed
  std::uint64_t preemptions = 0;  // a started, unfinished message was passed over by another
};

// Messages to one peer, cut into chunks.
//
// Order: (class, deadline, post order); FIFO among equals. The first message of a class of which
// nothing has left for `aging_s` moves up one class, never into kUrgent or above: so bulk can not
// starve, and what was posted together does not overtake together. A message that is not ready (no
// grant yet) is skipped; a ready head without credit is waited for and never overtaken.
//
// Thread safety: none; the owner's thread only.
// Units: bytes, seconds.
class SendQueue {
 public:
  struct Chunk {
    std::uint64_t id;
    std::uint64_t offset;
    std::uint64_t num_bytes;  // 0 only for an empty message
    bool is_last;
  };

  // `credit_bytes`: how many handed-out bytes may be unacknowledged; one chunk of overdraft.
  // Throws std::invalid_argument unless aging_s > 0; infinity switches ageing off.
  SendQueue(double aging_s, std::uint64_t credit_bytes);

  // `id` must be new. Throws std::invalid_argument for a known id, a class >= kNumClasses, a NaN
  // deadline or units of none or too many bytes.
  void post(std::uint64_t id, std::uint64_t num_bytes, Priority priority, double now_s,
            bool is_ready = true);
  bool setReady(std::uint64_t id);                      // false: unknown id
  bool cancel(std::uint64_t id);                        // false: unknown id

  // Keeps the post order and the ageing clock, so that changing it again and again can not starve
  // a message. False: unknown id. Throws like `post`.
  bool reprioritise(std::uint64_t id, Priority priority);

  // Takes the next chunk of at most `chunk_bytes`, or of one unit, off the queue; none if nothing
  // is ready or the head lacks credit (outstanding >= credit). The message disappears with its last
  // chunk.
  // Throws std::invalid_argument for chunk_bytes 0.
  std::optional<Chunk> next(double now_s, std::uint64_t chunk_bytes);

  // The effective priority of the message that `next` would serve, ignoring credit.
  std::optional<Priority> head(double now_s);

  void setCredit(std::uint64_t credit_bytes);
  void acknowledge(std::uint64_t num_bytes);  // clamps at what is outstanding
  std::uint64_t outstanding() const { return outstanding_bytes_; }
  std::uint64_t queuedBytes() const { return queued_bytes_; }
  std::size_t size() const { return messages_.size(); }
  const QueueStats& stats() const { return stats_; }

 private:
  using Key = std::tuple<std::uint8_t, double, std::uint64_t>;  // class, deadline, post order

  struct Message {
    Key key;
    std::uint64_t num_bytes;
    std::uint64_t unit_bytes;
    std::uint64_t offset = 0;
    double posted_s;
    double waiting_s;  // since when: it was posted or moved up
    std::uint8_t posted_class;
    bool is_ready;
    bool is_started = false;
  };
  using Messages = std::unordered_map<std::uint64_t, Message>;

  void age(double now_s);
  using Ready = std::map<Key, std::uint64_t>;  // what may be served, first one first

  Ready::iterator firstOf(std::uint8_t traffic_class);  // ready_.end(): none
  void enter(std::uint64_t id, const Message& message);  // what is ready
  void erase(Messages::iterator entry);
  void noteService(std::uint64_t id, Message& message, double now_s);

  double aging_s_;
  std::uint64_t credit_bytes_;
  std::uint64_t outstanding_bytes_ = 0;
  std::uint64_t queued_bytes_ = 0;
  std::uint64_t posts_ = 0;
  std::optional<std::uint64_t> current_;  // served last and unfinished, for counting preemptions
  Messages messages_;
  Ready ready_;
  std::array<double, kNumClasses> waiting_s_;  // since when each class does, while it has any ready
  QueueStats stats_;
};

}  // namespace dora
