#include "collectives.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <utility>

#include "ring.h"

namespace dora {

namespace {

// In the queue of finished messages: there are new commands.
constexpr std::uint64_t kWake = std::numeric_limits<std::uint64_t>::max();
// The timeout of a wait that ends by a message or a command.
constexpr double kIdleS = 3600;
// Two rings of team size - 1 steps each must fit the 16 bits of a step.
constexpr std::size_t kMaxTeam = 1u << 15;
constexpr std::uint32_t kMaxRank = std::numeric_limits<std::int32_t>::max();

std::string describe(const std::vector<std::uint32_t>& ranks) {
  std::string text = "[";
  for (std::uint32_t rank : ranks) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(rank);
  }
  return text + "]";
}

// The place of `rank` in the team.
std::size_t placeOf(std::uint32_t rank, const Team& team, const char* what) {
  const auto found = std::find(team.ranks.begin(), team.ranks.end(), rank);
  if (found == team.ranks.end()) {
    throw std::invalid_argument(std::string(what) + ": given " + std::to_string(rank) +
                                ", allowed are ranks of the team " + describe(team.ranks));
  }
  return static_cast<std::size_t>(found - team.ranks.begin());
}

void checkTeam(const Team& team) {
  std::vector<std::uint32_t> sorted = team.ranks;
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
    throw std::invalid_argument("team: given " + describe(team.ranks) +
                                ", allowed are distinct ranks");
  }
  if (!sorted.empty() && sorted.back() > kMaxRank) {
    throw std::invalid_argument("team: given rank " + std::to_string(sorted.back()) +
                                ", allowed up to " + std::to_string(kMaxRank));
  }
  if (sorted.size() > kMaxTeam) {
    throw std::invalid_argument("team: given " + std::to_string(sorted.size()) +
                                " ranks, allowed up to " + std::to_string(kMaxTeam));
  }
  if (team.priority.traffic_class >= kNumClasses || std::isnan(team.priority.deadline)) {
    throw std::invalid_argument(
        "priority: given class " + std::to_string(team.priority.traffic_class) + ", deadline " +
        std::to_string(team.priority.deadline) + ", allowed classes below " +
        std::to_string(kNumClasses) + " and deadlines that are numbers");
  }
  if (!(team.timeout_s >= 0)) {
    throw std::invalid_argument("timeout_s: given " + std::to_string(team.timeout_s) +
                                ", allowed 0 or more");
  }
}

void checkShares(const std::vector<double>& shares, ReduceOp op, const Team& team) {
  if (shares.empty()) return;
  if (shares.size() != team.ranks.size()) {
    throw std::invalid_argument("shares: given " + std::to_string(shares.size()) +
                                ", allowed none or one per team member, " +
                                std::to_string(team.ranks.size()));
  }
  if (op != ReduceOp::kSum) {
    throw std::invalid_argument("shares: given with another op than sum, allowed only with sum");
  }
  for (double share : shares) {
    if (!std::isfinite(share)) {
      throw std::invalid_argument("shares: given " + std::to_string(share) +
                                  ", allowed are finite numbers");
    }
  }
}

}  // namespace

struct Collectives::State {
  State(std::shared_ptr<Messenger> messenger, std::uint32_t own_rank) : rank(own_rank) {
    messages.messenger = std::move(messenger);
    messages.finished = std::make_shared<CompletionQueue>();
    thread = std::thread([this] { run(); });
  }

  OperationPtr begin(const char* name, const Team& team, Exchange::Start start);
  void submit(std::function<void()> command);
  void run();
  void runCommands();
  void settle(std::uint64_t id);
  void forgetIfOver(const Exchange& exchange);
  void failAll();

  const std::uint32_t rank;

  std::mutex mutex;
  std::vector<std::function<void()>> commands;             // guarded by the mutex
  std::unordered_map<std::uint32_t, std::uint64_t> calls;  // guarded: collectives, by group
  std::uint64_t num_calls = 0;                             // guarded

  // The thread's own.
  Messages messages;
  std::unordered_map<std::uint64_t, std::shared_ptr<Exchange>> running;  // by the parent's id
  bool is_closing = false;

  std::thread thread;
};

// The number of the call is taken here, in the caller's order, and with it the identity of all
// messages: so it does not matter in which order the ranks get round to sending them. A call that
// is refused takes none.
OperationPtr Collectives::State::begin(const char* name, const Team& team,
                                       Exchange::Start start) {
  checkTeam(team);
  const std::size_t index = placeOf(rank, team, "own rank");
  std::lock_guard<std::mutex> lock(mutex);
  auto parent = std::make_shared<Operation>(kOwnIds | num_calls++);
  auto exchange = std::make_shared<Exchange>(messages, team, index, calls[team.group]++, name,
                                             parent, std::move(start));
  commands.push_back([this, exchange] {
    running.emplace(exchange->id(), exchange);
    exchange->start();
    forgetIfOver(*exchange);
  });
  messages.finished->push(kWake);
  return parent;
}

void Collectives::State::submit(std::function<void()> command) {
  std::lock_guard<std::mutex> lock(mutex);
  commands.push_back(std::move(command));
  messages.finished->push(kWake);
}

void Collectives::State::run() {
  while (!is_closing || !running.empty()) {
    for (std::uint64_t id : messages.finished->take(kIdleS)) {
      if (id == kWake) {
        runCommands();
      } else {
        settle(id);
      }
    }
  }
}

void Collectives::State::runCommands() {
  std::vector<std::function<void()>> taken;
  {
    std::lock_guard<std::mutex> lock(mutex);
    taken.swap(commands);
  }
  for (const auto& command : taken) command();
}

void Collectives::State::settle(std::uint64_t id) {
  const auto found = messages.children.find(id);
  const Messages::Child child = std::move(found->second);
  messages.children.erase(found);
  child.exchange->settle(child);
  forgetIfOver(*child.exchange);
}

void Collectives::State::forgetIfOver(const Exchange& exchange) {
  if (exchange.isOver()) running.erase(exchange.id());
}

void Collectives::State::failAll() {
  for (const auto& [id, exchange] : running) exchange->fail(Outcome::kClosed, "shut down");
  is_closing = true;
}

Collectives::Collectives(std::shared_ptr<Messenger> messenger, std::uint32_t rank)
    : state_(std::make_unique<State>(std::move(messenger), rank)) {}

Collectives::~Collectives() {
  state_->submit([state = state_.get()] { state->failAll(); });
  state_->thread.join();
}

OperationPtr Collectives::allReduce(void* data, std::size_t count, DataType type, ReduceOp op,
                                    const std::vector<double>& shares, const Team& team) {
  sizeOf(type);  // refuses an unknown one
  checkShares(shares, op, team);
  return state_->begin("all_reduce", team, [=](Exchange& exchange) {
    const double share = shares.empty() ? 1 : shares[exchange.index()];
    dora::allReduce(exchange, data, count, {type, op}, share);
  });
}

OperationPtr Collectives::reduceScatter(const void* input, void* output, std::size_t count,
                                        DataType type, ReduceOp op, const Team& team) {
  sizeOf(type);
  return state_->begin("reduce_scatter", team, [=](Exchange& exchange) {
    dora::reduceScatter(exchange, input, output, count, {type, op});
  });
}

OperationPtr Collectives::allGather(const void* input, void* output, std::uint64_t num_bytes,
                                    const Team& team) {
  return state_->begin("all_gather", team, [=](Exchange& exchange) {
    dora::allGather(exchange, input, output, num_bytes);
  });
}

OperationPtr Collectives::broadcast(void* data, std::uint64_t num_bytes, std::uint32_t root,
                                    const Team& team) {
  const std::size_t place = placeOf(root, team, "root");
  return state_->begin("broadcast", team, [=](Exchange& exchange) {
    dora::broadcast(exchange, data, num_bytes, place);
  });
}

OperationPtr Collectives::barrier(const Team& team) {
  return state_->begin("barrier", team, [](Exchange& exchange) { dora::barrier(exchange); });
}

void Collectives::cancel(const OperationPtr& operation) {
  state_->submit([state = state_.get(), id = operation->id] {
    const auto found = state->running.find(id);
    if (found != state->running.end()) {
      found->second->fail(Outcome::kCancelled, "cancelled on rank " + std::to_string(state->rank));
    }
  });
}

}  // namespace dora
