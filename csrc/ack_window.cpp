#include "ack_window.h"

#include <algorithm>

namespace dora {

bool AckWindow::onChunk(std::uint64_t num_bytes, std::uint64_t chunk_bytes, bool is_last_queued) {
  unasked_bytes_ += num_bytes;
  // The chunk size may have grown since the credit was fitted to it.
  std::uint64_t due = std::min(2 * chunk_bytes, credit_bytes_ / 4);
  bool is_asking = is_last_queued || unasked_bytes_ >= due;
  if (is_asking) unasked_bytes_ = 0;
  return is_asking;
}

std::uint64_t AckWindow::fit(std::uint64_t chunk_bytes, std::uint64_t in_flight_bytes) {
  // What nobody has asked about stays outstanding, however much the credit shrinks.
  credit_bytes_ =
      std::max({kMinCreditBytes, 8 * chunk_bytes, in_flight_bytes, unasked_bytes_ + 1});
  return credit_bytes_;
}

}  // namespace dora
