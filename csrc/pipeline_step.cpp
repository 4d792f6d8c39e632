#include "pipeline_step.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace dora::sim {

namespace {

struct Work {
  bool is_forward;
  int microbatch;
};

// The forwards and backwards of one replica in order; the rule and its proof are in
// dora/scheduler/pipeline.py.
std::vector<Work> orderOf(const std::string& kind, const std::vector<int>& microbatches, int window) {
  std::vector<Work> order;
  std::size_t next = 0;
  bool is_windowed = kind == "1f1b";
  if (!is_windowed)
    for (int m : microbatches) order.push_back({true, m});
  if (kind == "wavefront") return order;
  for (int j : microbatches) {
    for (; is_windowed && next < microbatches.size() && microbatches[next] < j + window; next++)
      order.push_back({true, microbatches[next]});
    order.push_back({false, j});
  }
  return order;
}

std::vector<int> microbatchesOf(const Step& step, std::size_t stage, int replica) {
  std::vector<int> own;
  for (std::size_t m = 0; m < step.routes.size(); m++)
    if (step.routes[m][stage] == replica) own.push_back(static_cast<int>(m));
  return own;
}

class Builder {
 public:
  Builder(const Network& network, const Step& step, Discipline discipline)
      : network_(network), step_(step), program_(emptyProgram(network, discipline)) {
    bool is_training = step.kind != "wavefront";
    std::size_t last = step.devices.size() - 1;
    for (std::size_t m = 0; m < step.routes.size(); m++) {
      const auto& route = step.routes[m];
      inputs_.push_back(addInput(step.devices[0][route[0]]));
      for (std::size_t s = 0; s < last; s++) {
        int a = step.devices[s][route[s]], b = step.devices[s + 1][route[s + 1]];
        down_.push_back(add(a, b, step.down_bytes[s]));
        up_.push_back(is_training ? add(b, a, step.up_bytes[s]) : kNone);
      }
    }
    for (std::size_t s = 0; s <= last; s++)
      for (std::size_t r = 0; r < step.devices[s].size(); r++) walk(s, static_cast<int>(r));
    for (const Reduction& reduction : step.reductions)
      appendAllReduce(program_, network, reduction.devices, reduction.num_bytes);
  }

  Program take() { return std::move(program_); }

 private:
  std::int32_t add(int src, int dst, double num_bytes) {
    program_.transfers.push_back(network_.transfer(src, dst, num_bytes));
    return static_cast<std::int32_t>(program_.transfers.size() - 1);
  }

  std::int32_t addInput(int device) {
    if (step_.source == kNone || step_.source == device) return kNone;
    std::int32_t input = add(step_.source, device, step_.input_bytes);
    program_.transfers[input].needs_send = program_.transfers[input].needs_receive = false;
    return input;
  }

  std::int32_t down(std::size_t s, int m) const { return down_[m * (step_.devices.size() - 1) + s]; }
  std::int32_t up(std::size_t s, int m) const { return up_[m * (step_.devices.size() - 1) + s]; }

  // What F or B of a stage waits for, and what it sends.
  std::int32_t awaited(std::size_t s, const Work& work) const {
    if (work.is_forward) return s > 0 ? down(s - 1, work.microbatch) : inputs_[work.microbatch];
    return s + 1 < step_.devices.size() ? up(s, work.microbatch) : kNone;
  }
  std::int32_t sent(std::size_t s, const Work& work) const {
    if (work.is_forward) return s + 1 < step_.devices.size() ? down(s, work.microbatch) : kNone;
    return s > 0 ? up(s - 1, work.microbatch) : kNone;
  }

  // Receives are posted `prefetch` computes ahead, that of a gradient not before its own forward.
  void walk(std::size_t s, int r) {
    auto order = orderOf(step_.kind, microbatchesOf(step_, s, r), step_.warmup[s]);
    std::vector<std::vector<std::int32_t>> posts(order.size() + 1);
    std::vector<std::size_t> forward_done(step_.routes.size());
    for (std::size_t i = 0; i < order.size(); i++) {
      if (order[i].is_forward) forward_done[order[i].microbatch] = i + 1;
      std::int32_t t = awaited(s, order[i]);
      if (t == kNone || (s == 0 && order[i].is_forward)) continue;
      std::size_t ahead = std::max(static_cast<int>(i) - step_.prefetch, 0);
      std::size_t after = order[i].is_forward ? 0 : forward_done[order[i].microbatch];
      posts[std::max(ahead, after)].push_back(t);
    }
    auto& ops = program_.ranks[step_.devices[s][r]];
    for (std::size_t i = 0; i < order.size(); i++) {
      for (std::int32_t t : posts[i]) ops.push_back({Op::kReceive, t, 0, 0});
      double own_s = (order[i].is_forward ? step_.forward_s : step_.backward_s)[s][r];
      ops.push_back({Op::kCompute, awaited(s, order[i]), own_s, 0});
      std::int32_t t = sent(s, order[i]);
      if (t != kNone) ops.push_back({Op::kSend, t, 0, 0});
    }
  }

  const Network& network_;
  const Step& step_;
  Program program_;
  std::vector<std::int32_t> inputs_, down_, up_;
};

double busiestMediumS(const Program& program) {
  std::vector<double> bytes(program.media->size());
  for (const Transfer& transfer : program.transfers)
    for (const Crossing& c : *transfer.path) bytes[c.medium] += transfer.num_bytes * c.times;
  double busiest_s = 0;
  for (std::size_t m = 0; m < bytes.size(); m++)
    busiest_s = std::max(busiest_s, bytes[m] / (*program.media)[m].capacity(1));
  return busiest_s;
}

// Of a step after another, so that no rank is ahead.
double busiestRankS(const Program& program) {
  double busiest_s = 0;
  for (const auto& ops : program.ranks) {
    double busy_s = 0;
    for (const Op& op : ops) busy_s += op.duration_s;
    busiest_s = std::max(busiest_s, busy_s);
  }
  return busiest_s;
}

}  // namespace

Network::Network(std::size_t num_devices)
    : num_devices_(num_devices),
      media_(std::make_shared<std::vector<FluidMedium>>()),
      path_of_(num_devices * num_devices),
      latency_s_(num_devices * num_devices) {}

std::uint32_t Network::addMedium(FluidMedium medium) {
  // Programs keep the media that they were made with.
  if (media_.use_count() > 1) media_ = std::make_shared<std::vector<FluidMedium>>(*media_);
  media_->push_back(std::move(medium));
  return static_cast<std::uint32_t>(media_->size() - 1);
}

void Network::connect(std::size_t src, std::size_t dst, Path path, double latency_s) {
  latency_s_.at(src * num_devices_ + dst) = latency_s;
  path_of_.at(src * num_devices_ + dst) = std::make_shared<const Path>(std::move(path));
}

void Network::setRest(std::size_t device, Rest rest) {
  rests_.resize(num_devices_);
  rests_.at(device) = rest;
}

Transfer Network::transfer(std::size_t src, std::size_t dst, double num_bytes) const {
  std::size_t pair = src * num_devices_ + dst;
  if (!path_of_.at(pair))
    throw std::invalid_argument("no link from device " + std::to_string(src) + " to device " +
                                std::to_string(dst));
  Transfer transfer;
  transfer.path = path_of_[pair];
  transfer.src = static_cast<std::int32_t>(src);
  transfer.dst = static_cast<std::int32_t>(dst);
  transfer.num_bytes = num_bytes;
  transfer.latency_s = latency_s_[pair];
  return transfer;
}

Program emptyProgram(const Network& network, Discipline discipline) {
  Program program;
  program.media = network.media();
  program.ranks.resize(network.numDevices());
  program.rests = network.rests();
  program.discipline = discipline;
  return program;
}

void appendAllReduce(Program& program, const Network& network, const std::vector<int>& ranks,
                     double num_bytes) {
  std::size_t k = ranks.size();
  if (k < 2) return;
  for (std::size_t round = 0; round < 2 * (k - 1); round++) {
    auto first = static_cast<std::int32_t>(program.transfers.size());
    for (std::size_t i = 0; i < k; i++) {
      Transfer transfer = network.transfer(ranks[i], ranks[(i + 1) % k], num_bytes / k);
      transfer.needs_receive = false;
      transfer.is_reduction = true;
      program.transfers.push_back(transfer);
      program.ranks[ranks[i]].push_back({Op::kSend, first + static_cast<std::int32_t>(i), 0, 0});
    }
    for (std::size_t i = 0; i < k; i++) {
      auto before = static_cast<std::int32_t>((i + k - 1) % k);
      program.ranks[ranks[i]].push_back({Op::kCompute, first + before, 0, 0});
    }
  }
}

Program buildStep(const Network& network, const Step& step, Discipline discipline) {
  return Builder(network, step, discipline).take();
}

std::vector<std::vector<int>> inFlight(const Step& step) {
  std::vector<std::vector<int>> most;
  for (std::size_t s = 0; s < step.devices.size(); s++) {
    most.emplace_back();
    for (std::size_t r = 0; r < step.devices[s].size(); r++) {
      int held = 0, peak = 0;
      for (const Work& work : orderOf(step.kind, microbatchesOf(step, s, static_cast<int>(r)), step.warmup[s])) {
        held += work.is_forward ? 1 : -1;
        peak = std::max(peak, held);
      }
      most.back().push_back(step.kind == "wavefront" ? 0 : peak);
    }
  }
  return most;
}

Price price(const Network& network, const Step& step, Discipline discipline) {
  Program program = buildStep(network, step, discipline);
  std::vector<double> priority = priorities(program);
  for (std::size_t t = 0; t < priority.size(); t++) program.transfers[t].priority = priority[t];
  Played played = play(program);
  double interval_s = std::max(busiestMediumS(program), busiestRankS(program));
  return {played.end_s, interval_s, played.busy_s, played.sent_bytes, played.received_bytes};
}

}  // namespace dora::sim
