#include "rate.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace dora {
namespace {

constexpr double kChunkS = 0.002;
constexpr std::uint64_t kChunkStepBytes = 4 * 1024;
constexpr std::uint64_t kUnknownChunkBytes = 64 * 1024;

constexpr double kWarmUpS = 0.1;
constexpr double kMaxPacedBytesPerS = 250e6;

// One cycle is a probe, a drain as long, and cruising. At 1.15 a probe of 40 ms leaves a queue of
// at most 6 ms, which the drain empties. On a 100 Mbit/s tbf link (bench_comm.py) a 32 MiB transfer
// takes 0.5 to 1.5 % longer than unpaced, and an urgent message beside it 0.2 to 2.5 ms.
constexpr double kMinCycleS = 2.0;
constexpr double kProbeGain = 1.15;
constexpr double kDrainGain = 0.75;
constexpr double kCruiseGain = 0.99;

// A probe has to last a round trip, or no sample lies within it, and a few chunks, as pacing acts
// on whole chunks: that is 0.4 s at 1 Mbit/s, so there a cycle is longer.
constexpr double kMinProbeS = 0.040;
constexpr double kMaxRttS = 0.250;
constexpr double kProbeChunks = 2;
constexpr double kCycleProbes = 4;

// A few small messages say nothing about the link: what they take is mostly waiting.
constexpr std::uint64_t kLowSampleBytes = 64 * 1024;

// So much in less than kSampleS is more than a token bucket or a late reader makes up.
constexpr std::uint64_t kFastSampleBytes = 4 * 1024 * 1024;

// Queues at which the pace is corrected, and how often. The kernel's smoothed round trip shows
// 1.1 ms on an idle-queue 100 Mbit/s link, since packets leave in bursts; correcting from 1.0 ms on
// cost 7 % of the rate. A lossy or jittery link looks like a queue, so the correction has a limit.
constexpr double kLongQueueS = 0.0020;
constexpr double kShortQueueS = 0.0014;
constexpr double kTrimS = 0.040;
constexpr double kMinTrim = 0.95;

// Shares of a medium differ by more than noise and the bursts of token buckets do.
constexpr double kShared = 1.25;

// A sample within a probe of a faster link shows up to 1.15; noise rarely shows 1.08. Going on at
// once, a link that became 3 times as fast is found within 5 probes in a row instead of 5 seconds.
constexpr double kFoundMore = 1.08;

}  // namespace

void RateEstimator::onSent(std::uint64_t sent_bytes, double now_s) {
  if (acked_bytes_ >= sent_bytes_) {
    marks_ = {{acked_bytes_, now_s, now_s, true}};
  }
  if (now_s - cycle_start_s_ >= cycleS()) startCycle(now_s);
  sent_bytes_ = sent_bytes;
  probes_.push_back({sent_bytes, now_s, acked_bytes_ <= idle_until_});
}

void RateEstimator::onIdle() { idle_until_ = sent_bytes_; }

void RateEstimator::onAck(std::uint64_t acked_bytes, double now_s) {
  if (acked_bytes <= acked_bytes_) return;
  acked_bytes_ = acked_bytes;
  std::optional<Probe> probe;
  while (!probes_.empty() && probes_.front().sent_bytes <= acked_bytes) {
    probe = probes_.front();
    probes_.pop_front();
  }
  if (!probe) return;
  const double rtt_s = now_s - probe->sent_s;
  min_rtt_s_ = std::min(min_rtt_s_.value_or(rtt_s), rtt_s);
  measure(*probe, now_s);
  marks_.push_back({acked_bytes, now_s, probe->sent_s, false});
}

void RateEstimator::measure(const Probe& probe, double now_s) {
  const double latest_s = std::min(probe.sent_s, now_s - kSampleS);
  while (marks_.size() > 1 && marks_[1].acked_s <= latest_s) marks_.pop_front();
  const Mark& from = marks_.front();
  const double elapsed_s = std::max(now_s - from.acked_s, probe.sent_s - from.sent_s);
  const std::uint64_t num_bytes = acked_bytes_ - from.acked_bytes;
  const bool is_low = probe.is_idle || from.is_start;  // may under-report
  const bool is_long = elapsed_s >= kSampleS && (!is_low || num_bytes >= kLowSampleBytes);
  if (!is_long && (elapsed_s <= 0 || num_bytes < kFastSampleBytes)) return;
  const double rate = static_cast<double>(num_bytes) / elapsed_s;
  if (!is_low || rate > rateBytesPerS().value_or(0)) add({now_s, rate});
  if (rateBytesPerS().value_or(0) > kFoundMore * cycle_rate_) startCycle(now_s);
}

// Old samples go only when a new one comes, so that the estimate outlives a pause.
void RateEstimator::add(Sample sample) {
  if (best_.empty()) first_sample_s_ = sample.time_s;
  for (auto [largest, window_s] : {std::pair{&best_, kWindowS}, {&peak_, kPeakWindowS}}) {
    while (!largest->empty() && largest->back().rate <= sample.rate) largest->pop_back();
    largest->push_back(sample);
    while (largest->front().time_s < sample.time_s - window_s) largest->pop_front();
  }
}

void RateEstimator::startCycle(double now_s) {
  cycle_start_s_ = now_s;
  cycle_rate_ = rateBytesPerS().value_or(0);
}

std::optional<double> RateEstimator::rateBytesPerS() const {
  if (best_.empty()) return std::nullopt;
  return best_.front().rate;
}

std::optional<double> RateEstimator::minRttS() const { return min_rtt_s_; }

std::uint64_t RateEstimator::chunkBytes() const {
  const auto rate = rateBytesPerS();
  if (!rate) return kUnknownChunkBytes;
  const double steps = std::round(*rate * kChunkS / kChunkStepBytes);
  const double most = static_cast<double>(kMaxChunkBytes / kChunkStepBytes);
  return std::max(kMinChunkBytes,
                  static_cast<std::uint64_t>(std::min(steps, most)) * kChunkStepBytes);
}

double RateEstimator::probeS() const {
  const double rate = rateBytesPerS().value_or(kMaxPacedBytesPerS);
  const double chunks_s = kProbeChunks * static_cast<double>(chunkBytes()) / rate;
  return std::max(kMinProbeS, chunks_s + std::min(min_rtt_s_.value_or(0), kMaxRttS));
}

double RateEstimator::cycleS() const { return std::max(kMinCycleS, kCycleProbes * probeS()); }

void RateEstimator::onQueueing(double queue_s, double now_s) {
  if (now_s - trimmed_s_ < kTrimS) return;
  trimmed_s_ = now_s;
  if (queue_s > kLongQueueS) trim_ = std::max(kMinTrim, trim_ * 0.99);
  if (queue_s < kShortQueueS) trim_ = std::min(1.0, trim_ * 1.002);
}

double RateEstimator::paceBytesPerS(double now_s) const {
  const auto rate = rateBytesPerS();
  if (!rate || now_s < first_sample_s_ + kWarmUpS || *rate > kMaxPacedBytesPerS) return 0;
  if (peak_.front().rate > kShared * *rate) return peak_.front().rate;
  const double phase_s = now_s - cycle_start_s_;
  const double probe_s = probeS();
  const double pace = trim_ * *rate;
  // What the start without a limit has left in the link's queue.
  if (now_s < first_sample_s_ + kWarmUpS + 2 * probe_s) return kDrainGain * pace;
  // At the end of a cycle a probe is due, and starts with the next chunk.
  if (phase_s < probe_s || phase_s >= cycleS()) return kProbeGain * pace;
  if (phase_s < 2 * probe_s) return kDrainGain * pace;
  return kCruiseGain * pace;
}

}  // namespace dora
