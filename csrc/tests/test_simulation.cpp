#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "pipeline_step.h"

namespace dora::sim {
namespace {

bool isNear(double a, double b) { return std::fabs(a - b) <= 1e-9 * std::max(1.0, std::fabs(b)); }

// All pairs of devices on one channel, or on a medium of their own per direction.
Network networkOf(std::size_t num_devices, bool is_shared, double latency_s) {
  Network network(num_devices);
  std::uint32_t channel = is_shared ? network.addMedium({10.0, {1.0, 0.8}}) : 0;
  for (std::size_t a = 0; a < num_devices; a++)
    for (std::size_t b = 0; b < num_devices; b++)
      if (a != b)
        network.connect(a, b, {{is_shared ? channel : network.addMedium({10.0, {1.0}}), 1}}, latency_s);
  return network;
}

void testFairAndPriority() {
  std::vector<FluidMedium> media = {{10.0, {1.0, 0.8}}, {3.0, {1.0}}};
  Path both = {{0, 1}, {1, 1}}, twice = {{0, 2}};
  std::vector<Flow> flows(2);
  flows[0].path = &both;
  flows[1].path = &twice;
  shareMedia(media, Discipline::kFair, {&flows[0], &flows[1]});
  CHECK(isNear(flows[0].rate_bytes_per_s, 8.0 / 3) && isNear(flows[1].rate_bytes_per_s, 8.0 / 3));
  shareMedia(media, Discipline::kPriority, {&flows[0], &flows[1]});
  CHECK(isNear(flows[0].rate_bytes_per_s, 3) && isNear(flows[1].rate_bytes_per_s, 2.5));
}

void testAllReduce() {
  for (int k = 1; k < 6; k++) {
    Network network = networkOf(k, false, 0.5);
    Program program = emptyProgram(network, Discipline::kPriority);
    std::vector<int> ranks;
    for (int r = 0; r < k; r++) ranks.push_back(r);
    appendAllReduce(program, network, ranks, 60);
    CHECK(isNear(play(program).end_s, 2 * (k - 1) * (6.0 / k + 0.5)));
  }
}

// Stages of one or two devices, two devices to spare, one of which has the inputs.
Step randomStep(std::mt19937& random) {
  auto draw = [&](int from, int to) { return std::uniform_int_distribution<int>(from, to)(random); };
  Step step;
  int num_stages = draw(1, 3), num_microbatches = draw(1, 7), num_devices = 0, extra = draw(0, 2);
  for (int s = 0; s < num_stages; s++) {
    step.devices.emplace_back();
    for (int r = draw(1, 2); r > 0; r--) step.devices.back().push_back(num_devices++);
    step.forward_s.emplace_back(step.devices.back().size(), draw(1, 5) * 0.1);
    step.backward_s.emplace_back(step.devices.back().size(), draw(0, 5) * 0.1);
    if (step.devices.back().size() > 1) step.reductions.push_back({step.devices.back(), 12.0});
    step.warmup.push_back((num_stages - s) * (1 + extra));  // never ascends: no deadlock
    if (s > 0) step.down_bytes.push_back(draw(0, 9));
    if (s > 0) step.up_bytes.push_back(draw(0, 9));
  }
  for (int m = 0; m < num_microbatches; m++) {
    step.routes.emplace_back();
    for (const auto& stage : step.devices)
      step.routes.back().push_back(draw(0, static_cast<int>(stage.size()) - 1));
  }
  step.kind = std::vector<std::string>{"gpipe", "1f1b", "wavefront"}[draw(0, 2)];
  step.source = draw(-1, num_devices);
  step.input_bytes = 4;
  return step;
}

double sum(const std::vector<double>& values) {
  double total = 0;
  for (double value : values) total += value;
  return total;
}

void testRandomSteps() {
  std::mt19937 random(1);
  for (int i = 0; i < 300; i++) {
    Step step = randomStep(random);
    Network network = networkOf(8, i % 2 == 0, i % 3 * 0.1);
    for (Discipline discipline : {Discipline::kFair, Discipline::kPriority}) {
      Price found = price(network, step, discipline);
      CHECK(std::isfinite(found.makespan_s));
      CHECK(found.interval_s <= found.makespan_s + 1e-9);
      CHECK(isNear(sum(found.sent_bytes), sum(found.received_bytes)));
      CHECK(price(network, step, discipline).makespan_s == found.makespan_s);
    }
    CHECK(inFlight(step).size() == step.devices.size());
  }
}

// Rates and speeds that change while everything is under way, also to nothing and back.
void testChanges() {
  std::mt19937 random(2);
  for (int i = 0; i < 300; i++) {
    Program program = buildStep(networkOf(8, true, 0), randomStep(random), Discipline::kPriority);
    double usual_s = play(program).end_s;
    for (int c = 0; c < 6; c++)
      program.changes.push_back({c * usual_s / 5, random() % 2 == 0, 0, (random() % 3) * 0.5});
    for (bool is_medium : {true, false}) program.changes.push_back({2 * usual_s, is_medium, 0, 1.0});
    Played played = play(program);
    CHECK(played.stuck == kNone);
    CHECK(std::isfinite(played.end_s));
  }
}

void testGone() {
  Network network = networkOf(2, true, 0);
  Step step;
  step.devices = {{0}, {1}};
  step.forward_s = step.backward_s = {{1.0}, {1.0}};
  step.down_bytes = step.up_bytes = {5.0};
  step.routes = {{0, 0}};
  step.warmup = {1, 1};
  step.kind = "1f1b";
  Program program = buildStep(network, step, Discipline::kPriority);
  CHECK(isNear(play(program).end_s, 5.0));
  program.changes = {{1.0, false, 1, 0.0}};
  CHECK(play(program).stuck == 1);
  program.changes = {{1.0, true, 0, 0.0}};
  CHECK(play(program).stuck == 0);
  CHECK_THROWS(Network(2).transfer(0, 1, 1.0), std::invalid_argument);
}

}  // namespace
}  // namespace dora::sim

int main() {
  dora::sim::testFairAndPriority();
  dora::sim::testAllReduce();
  dora::sim::testRandomSteps();
  dora::sim::testChanges();
  dora::sim::testGone();
}
