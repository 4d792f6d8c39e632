// Prices one step of a pipeline plan: builds the program of all ranks and plays it. std only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "simulation.h"

namespace dora::sim {

// Devices and the media between them, by index.
class Network {
 public:
  explicit Network(std::size_t num_devices);

  std::uint32_t addMedium(FluidMedium medium);
  void connect(std::size_t src, std::size_t dst, Path path, double latency_s);
  void setRest(std::size_t device, Rest rest);

  std::size_t numDevices() const { return num_devices_; }
  std::shared_ptr<const std::vector<FluidMedium>> media() const { return media_; }
  const std::vector<Rest>& rests() const { return rests_; }

  // A transfer between two devices; std::invalid_argument if no link joins them.
  Transfer transfer(std::size_t src, std::size_t dst, double num_bytes) const;

 private:
  std::size_t num_devices_;
  std::shared_ptr<std::vector<FluidMedium>> media_;
  std::vector<std::shared_ptr<const Path>> path_of_;  // of src * num_devices + dst; null: no link
  std::vector<double> latency_s_;
  std::vector<Rest> rests_;
};

// An empty program for all devices of a network.
Program emptyProgram(const Network& network, Discipline discipline);

// Appends a ring all-reduce of `num_bytes` to the lists of `ranks`: 2 (k - 1) rounds in which each
// sends 1/k of it to the next. See Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for
// clusters of workstations", JPDC 2009.
void appendAllReduce(Program& program, const Network& network, const std::vector<int>& ranks,
                     double num_bytes);

struct Reduction {
  std::vector<int> devices;
  double num_bytes = 0;
};

// One step of a plan. What is `[stage]` and `[replica]` follows the plan; bytes are `[boundary]`.
struct Step {
  std::vector<std::vector<int>> devices;
  std::vector<std::vector<double>> forward_s, backward_s;
  std::vector<double> down_bytes, up_bytes;
  std::vector<std::vector<int>> routes;  // per micro-batch, the replica at each stage
  std::vector<int> warmup;
  std::string kind;  // gpipe, 1f1b or wavefront
  std::vector<Reduction> reductions;
  int source = kNone;  // device of the inputs, if they have to travel to the first stage
  double input_bytes = 0;
  int prefetch = 2;
};

// Builds what `dora.scheduler.build_schedule` gives for the same plan, as ops and transfers.
Program buildStep(const Network& network, const Step& step, Discipline discipline);

// Most micro-batches that each replica holds between forward and backward; `[stage][replica]`.
std::vector<std::vector<int>> inFlight(const Step& step);

struct Price {
  double makespan_s = 0;
  double interval_s = 0;  // between steps or requests, if only devices and media limited them
  std::vector<double> busy_s, sent_bytes, received_bytes;  // per device
};

// Plays a step with each transfer as urgent as its tail is long.
Price price(const Network& network, const Step& step, Discipline discipline);

}  // namespace dora::sim
