// Estimates the rate and round trip of a link from acknowledgements, and the chunk size and pace
// that follow from it. std only; time is an argument.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>

namespace dora {

constexpr std::uint64_t kMinChunkBytes = 16 * 1024;
constexpr std::uint64_t kMaxChunkBytes = 1024 * 1024;

// Delivery rate and minimal round trip of one lane.
//
// A sample is the bytes delivered between an acknowledgement that arrived before a probe left, and
// at least `kSampleS` before the probe's own, and that one, over that time (or the time it took to
// hand them over, if that was longer); the estimate is the largest sample of the last `kWindowS`
// seconds. Samples taken while the sender had nothing to send, or from a start with nothing
// outstanding, count only if they raise the estimate. See Cardwell et al., "BBR: Congestion-Based
// Congestion Control", ACM Queue 2016.
class RateEstimator {
 public:
  static constexpr double kWindowS = 2.0;

  // The pace is that of the largest sample of this long if the present ones are far below: then
  // several devices share the medium, and one that paces by its share leaves the rest unused
  // whenever the others wait.
  static constexpr double kPeakWindowS = 30.0;

  // Longer samples suffer less from late, bunched acknowledgements, but those over 40 ms do not fit
  // into the probe that has to show a rise.
  static constexpr double kSampleS = 0.040;

  // A chunk that asks for an acknowledgement has been handed over; `sent_bytes` is the cumulative
  // count including it.
  void onSent(std::uint64_t sent_bytes, double now_s);

  // The queue ran empty: bytes outstanding now may under-report the rate. The last chunk before it
  // should have asked for an acknowledgement.
  void onIdle();

  // Cumulative acknowledged bytes.
  void onAck(std::uint64_t acked_bytes, double now_s);

  // Data waits `queue_s` in the network: the pace is above the link's rate, since the largest
  // sample is a little too large. Corrects the pace by up to 5 %, not the estimate.
  void onQueueing(double queue_s, double now_s);

  std::optional<double> rateBytesPerS() const;  // none before the first sample
  std::optional<double> minRttS() const;

  // About 2 ms of wire time, a multiple of 4 KiB in [kMinChunkBytes, kMaxChunkBytes]; 64 KiB
  // while the rate is unknown.
  std::uint64_t chunkBytes() const;

  // What to ask of the kernel's pacing, in bytes/s; 0 means no limit. Just below the link's rate,
  // so that no queue builds up in it, with a short probe above it every second so that a rise is
  // noticed, followed by a drain as long; a probe that finds more goes on from there at once. No
  // limit while unknown, in the first 100 ms of samples, or above 250 MB/s, where a queue of one
  // chunk costs less than pacing. On a medium that seems to be shared: the rate of better times.
  double paceBytesPerS(double now_s) const;

 private:
  struct Probe {
    std::uint64_t sent_bytes;
    double sent_s;
    bool is_idle;
  };
  struct Mark {  // an acknowledgement, or a start with nothing outstanding
    std::uint64_t acked_bytes;
    double acked_s;
    double sent_s;  // when the last chunk it covers was handed over
    bool is_start;  // a sample from here also measures the round trip
  };
  struct Sample {
    double time_s;
    double rate;
  };
  using Largest = std::deque<Sample>;  // falling rates, rising times

  void startCycle(double now_s);
  void measure(const Probe& probe, double now_s);
  void add(Sample sample);
  double probeS() const;  // how long to probe
  double cycleS() const;  // from probe to probe

  std::deque<Probe> probes_;
  std::deque<Mark> marks_;   // the first one is where the next sample starts
  Largest best_;             // of the last kWindowS
  Largest peak_;             // of the last kPeakWindowS
  std::uint64_t sent_bytes_ = 0;
  std::uint64_t acked_bytes_ = 0;
  std::uint64_t idle_until_ = 0;
  double first_sample_s_ = 0;
  double cycle_start_s_ = 0;
  double cycle_rate_ = 0;  // the estimate at that time
  double trim_ = 1;
  double trimmed_s_ = 0;
  std::optional<double> min_rtt_s_;
};

}  // namespace dora
