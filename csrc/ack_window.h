// Which chunks ask for an acknowledgement, and how many bytes may be unacknowledged. std only.
#pragma once

#include <cstdint>

namespace dora {

// The window of one lane.
//
// The peer acknowledges only chunks that ask. Once all acknowledgements that were asked for have
// arrived, what is outstanding is what has left since the last such chunk, and that is less than
// the credit: so the next chunk may leave, and the lane never stands still.
class AckWindow {
 public:
  // Before the rate is known: enough to measure it, little enough for a slow link.
  static constexpr std::uint64_t kMinCreditBytes = 512 * 1024;

  // A chunk leaves; returns whether it has to ask.
  bool onChunk(std::uint64_t num_bytes, std::uint64_t chunk_bytes, bool is_last_queued);

  // Fits the credit to the link's chunks and to what is on the way at its rate; returns it.
  std::uint64_t fit(std::uint64_t chunk_bytes, std::uint64_t in_flight_bytes);

 private:
  std::uint64_t credit_bytes_ = kMinCreditBytes;
  std::uint64_t unasked_bytes_ = 0;  // left since the last chunk that asked
};

}  // namespace dora
