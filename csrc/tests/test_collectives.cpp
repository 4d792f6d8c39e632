// Collectives of up to seven ranks over a network in memory that delays and reorders messages.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "collectives.h"
#include "ring_memory.h"

using namespace dora;

namespace {

// Well inside the 60 s of the teams, so that nothing that ends here has just timed out.
void await(const std::vector<OperationPtr>& operations) {
  for (const auto& operation : operations) CHECK(operation->wait(30));
}

void awaitDone(const std::vector<OperationPtr>& operations) {
  await(operations);
  for (const auto& operation : operations) {
    if (!operation->error().empty()) std::fprintf(stderr, "%s\n", operation->error().c_str());
    CHECK(operation->outcome() == Outcome::kDone && operation->error().empty());
  }
}

// Calls `start(collectives, member)` on each member and waits.
template <typename Start>
void onAll(World& world, const Team& team, Start start) {
  std::vector<OperationPtr> operations;
  for (std::size_t i = 0; i < team.ranks.size(); ++i) {
    operations.push_back(start(*world.ranks[team.ranks[i]], i));
  }
  awaitDone(operations);
}

// Whatever the operation, at most 64 over seven members.
int valueOf(std::size_t member, std::size_t i) {
  return (member + i) % 3 == 0 ? 2 : (member + i) % 5 == 0 ? 3 : 1;
}

int reduced(std::size_t size, std::size_t i, ReduceOp op) {
  int result = valueOf(0, i);
  for (std::size_t member = 1; member < size; ++member) {
    const int value = valueOf(member, i);
    result = op == ReduceOp::kSum       ? result + value
             : op == ReduceOp::kProduct ? result * value
             : op == ReduceOp::kMin     ? std::min(result, value)
                                        : std::max(result, value);
  }
  return result;
}

void checkAllReduce(World& world, std::uint32_t size, std::size_t count, DataType type,
                    ReduceOp op) {
  const Team team = teamOf(size);
  std::vector<Bytes> data;
  for (std::size_t member = 0; member < size; ++member) {
    data.push_back(fill(count, type, [=](std::size_t i) { return valueOf(member, i); }));
  }
  onAll(world, team, [&](Collectives& collectives, std::size_t member) {
    return collectives.allReduce(data[member].data(), count, type, op, {}, team);
  });
  const Bytes wanted = fill(count, type, [=](std::size_t i) { return reduced(size, i, op); });
  for (const Bytes& given : data) CHECK(given == wanted);
}

void testAllReduceTypesAndSizes() {
  World world(7);
  int turn = 0;
  for (std::uint32_t size : kSizes) {
    for (int type = 0; type < 9; ++type) {
      for (std::size_t count : {0, 1, 5, 1000, 100003}) {
        checkAllReduce(world, size, count, static_cast<DataType>(type),
                       static_cast<ReduceOp>(turn++ % 4));
      }
    }
    checkAllReduce(world, size, 300000, DataType::kFloat32, ReduceOp::kSum);
  }
  CHECK(world.network.size() == 0);
}

void testAllReduceGivesEqualBitsEverywhereAndAlways() {
  for (std::uint32_t size : {2u, 3u, 7u}) {
    const Team team = teamOf(size);
    for (std::size_t count : {1000u, 300000u}) {
      std::vector<float> first;
      for (std::uint32_t run = 0; run < 2; ++run) {
        World world(7, run);
        std::vector<std::vector<float>> data;
        for (std::size_t member = 0; member < size; ++member) data.push_back(noise(count, member));
        onAll(world, team, [&](Collectives& collectives, std::size_t member) {
          return collectives.allReduce(data[member].data(), count, DataType::kFloat32,
                                       ReduceOp::kSum, {}, team);
        });
        if (first.empty()) first = data[0];
        for (const auto& given : data) {
          CHECK(std::memcmp(given.data(), first.data(), count * sizeof(float)) == 0);
        }
      }
    }
  }
}

void testAllReduceAveragesByShare() {
  World world(7);
  for (std::uint32_t size : kSizes) {
    const Team team = teamOf(size);
    std::vector<double> shares;
    for (std::uint32_t i = 0; i < size; ++i) shares.push_back(2.0 * (i + 1) / (size * (size + 1)));
    for (std::size_t count : {5u, 100003u}) {
      std::vector<std::vector<float>> data;
      for (std::uint32_t i = 0; i < size; ++i) data.emplace_back(count, static_cast<float>(i + 1));
      onAll(world, team, [&](Collectives& collectives, std::size_t member) {
        return collectives.allReduce(data[member].data(), count, DataType::kFloat32,
                                     ReduceOp::kSum, shares, team);
      });
      // sum i^2 / sum i
      const double wanted = (2.0 * size + 1) / 3;
      for (const auto& given : data) {
        for (float value : given) CHECK(std::fabs(value - wanted) < 1e-5);
      }
    }
  }
}

void testReduceScatterSizes() {
  World world(7);
  for (std::uint32_t size : kSizes) {
    const Team team = teamOf(size);
    for (std::size_t count : {0u, 1u, 5u, 1000u, 100003u, 300000u}) {
      const auto type = DataType::kFloat32;
      std::vector<Bytes> input, output(size, Bytes(count * 4));
      for (std::size_t m = 0; m < size; ++m) {
        input.push_back(fill(size * count, type, [=](std::size_t i) { return valueOf(m, i); }));
      }
      const std::vector<Bytes> before = input;
      onAll(world, team, [&](Collectives& collectives, std::size_t member) {
        return collectives.reduceScatter(input[member].data(), output[member].data(), count, type,
                                         ReduceOp::kSum, team);
      });
      CHECK(input == before);
      for (std::size_t member = 0; member < size; ++member) {
        CHECK(output[member] == fill(count, type, [=](std::size_t i) {
                return reduced(size, member * count + i, ReduceOp::kSum);
              }));
      }
    }
  }
  CHECK(world.network.size() == 0);
}

void testAllGatherSizes() {
  World world(7);
  for (std::uint32_t size : kSizes) {
    const Team team = teamOf(size);
    for (std::size_t count : {0u, 1u, 5u, 1000u, 100003u}) {
      std::vector<Bytes> input, output(size, Bytes(size * count));
      Bytes wanted;
      for (std::size_t member = 0; member < size; ++member) {
        input.push_back(pattern(count, member));
        wanted.insert(wanted.end(), input.back().begin(), input.back().end());
      }
      onAll(world, team, [&](Collectives& collectives, std::size_t member) {
        return collectives.allGather(input[member].data(), output[member].data(), count, team);
      });
      for (const Bytes& given : output) CHECK(given == wanted);
    }
  }
}

void testBroadcastFromEveryRoot() {
  World world(7);
  for (std::uint32_t size : kSizes) {
    const Team team = teamOf(size);
    for (std::size_t root = 0; root < size; ++root) {
      for (std::size_t count : {0u, 1u, 1000u, 100003u, 1200003u}) {
        std::vector<Bytes> data(size, Bytes(count));
        data[root] = pattern(count, root);
        onAll(world, team, [&](Collectives& collectives, std::size_t member) {
          return collectives.broadcast(data[member].data(), count, team.ranks[root], team);
        });
        for (const Bytes& given : data) CHECK(given == pattern(count, root));
      }
    }
  }
}

void testBarrierHoldsUntilTheLastMemberComes() {
  for (std::uint32_t size : kSizes) {
    World world(7);
    const Team team = teamOf(size);
    std::vector<OperationPtr> operations;
    for (std::uint32_t i = 0; i + 1 < size; ++i) {
      operations.push_back(world.ranks[team.ranks[i]]->barrier(team));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    for (const auto& operation : operations) CHECK(!operation->isDone());
    operations.push_back(world.ranks[team.ranks.back()]->barrier(team));
    awaitDone(operations);
  }
}

// Each rank calls from a thread of its own: the groups in its own order, the calls of one group
// in the same order everywhere; some groups have only some of the ranks.
void testConcurrentCollectivesDoNotMix() {
  constexpr std::uint32_t kNumGroups = 4, kNumCalls = 12;
  World world(7, 5);
  std::vector<std::vector<std::vector<float>>> data(7);
  std::vector<std::vector<OperationPtr>> operations(7);
  std::vector<std::thread> callers;
  for (std::uint32_t rank = 0; rank < 7; ++rank) {
    data[rank].resize(kNumGroups * kNumCalls);
    callers.emplace_back([&, rank] {
      std::vector<std::uint32_t> calls;
      for (std::uint32_t i = 0; i < kNumGroups * kNumCalls; ++i) calls.push_back(i % kNumGroups);
      std::shuffle(calls.begin(), calls.end(), std::mt19937(rank));
      std::uint32_t next[kNumGroups] = {};
      for (std::uint32_t group : calls) {
        const std::uint32_t call = next[group]++;
        const Team team{teamOf(7 - group).ranks, group, {kUrgent, 5}, 60};
        const auto& ranks = team.ranks;
        if (std::find(ranks.begin(), ranks.end(), rank) == ranks.end()) continue;
        auto& values = data[rank][group * kNumCalls + call];
        values.assign(call % 3 ? 20 * call : 30000, static_cast<float>(group + call + rank));
        operations[rank].push_back(world.ranks[rank]->allReduce(
            values.data(), values.size(), DataType::kFloat32, ReduceOp::kSum, {}, team));
      }
    });
  }
  for (auto& caller : callers) caller.join();
  for (const auto& of_rank : operations) awaitDone(of_rank);
  for (std::uint32_t rank = 0; rank < 7; ++rank) {
    for (std::uint32_t i = 0; i < kNumGroups * kNumCalls; ++i) {
      float wanted = 0;
      for (std::uint32_t member : teamOf(7 - i / kNumCalls).ranks) {
        wanted += static_cast<float>(i / kNumCalls + i % kNumCalls + member);
      }
      for (float value : data[rank][i]) CHECK(value == wanted);
    }
  }
  CHECK(world.network.size() == 0);
}

void checkFailed(const std::vector<OperationPtr>& operations, const std::string& prefix) {
  await(operations);
  for (const auto& operation : operations) {
    CHECK(operation->outcome() != Outcome::kDone);
    CHECK(operation->error().compare(0, prefix.size(), prefix) == 0);
  }
}

// Starts an all-reduce on the members from `first` to before `last`.
struct Attempt {
  Attempt(World& world, Team with, std::size_t count)
      : world(world), team(std::move(with)), data(7, std::vector<float>(count, 1)) {}
  std::vector<OperationPtr> start(std::size_t first, std::size_t last) {
    std::vector<OperationPtr> operations;
    for (std::size_t i = first; i < last; ++i) {
      operations.push_back(world.ranks[team.ranks[i]]->allReduce(
          data[i].data(), data[i].size(), DataType::kFloat32, ReduceOp::kSum, {}, team));
    }
    return operations;
  }
  World& world;
  Team team;
  std::vector<std::vector<float>> data;
};

void testLostRankEndsEverybody() {
  for (std::size_t count : {5u, 100003u}) {
    for (std::uint32_t seed = 0; seed < 8; ++seed) {
      World world(7, seed);
      Attempt attempt(world, teamOf(7), count);
      // The last member takes part or not, and is lost sooner or later.
      const auto operations = attempt.start(0, seed % 2 ? 7 : 6);
      std::this_thread::sleep_for(std::chrono::microseconds(seed * 200));
      world.network.lose(attempt.team.ranks.back());
      if (seed % 2) {
        await(operations);
      } else {
        checkFailed(operations, "all_reduce: ");
      }
      CHECK(world.network.size() == 0);
    }
  }
}

// A member that comes late learns at once that the others have given up.
void testTimeoutEndsEverybody() {
  for (std::size_t count : {5u, 100003u}) {
    World world(7);
    Attempt attempt(world, teamOf(7), count);
    attempt.team.timeout_s = 0.05;
    checkFailed(attempt.start(0, 6), "all_reduce: ");
    attempt.team.timeout_s = 60;
    const auto late = attempt.start(6, 7);
    checkFailed(late, "all_reduce: peer cancelled");
    CHECK(late[0]->outcome() == Outcome::kProtocol);
    CHECK(world.network.size() == 0);
    awaitDone(attempt.start(0, 7));  // the group still works
  }
}

// Who waits for the last member only learns of it when that one comes; in the small one, who has
// everything from the cancelling member already may even succeed.
void testCancelEndsEverybody() {
  for (std::size_t count : {5u, 100003u}) {
    World world(7);
    Attempt attempt(world, teamOf(4), count);
    auto operations = attempt.start(0, 3);
    world.ranks[attempt.team.ranks[1]]->cancel(operations[1]);
    checkFailed({operations[1]}, "all_reduce: cancelled on rank 0");
    CHECK(operations[1]->outcome() == Outcome::kCancelled);
    operations.push_back(attempt.start(3, 4)[0]);
    await(operations);
    if (count > 5) checkFailed(operations, "all_reduce: ");
    CHECK(world.network.size() == 0);
    world.ranks[attempt.team.ranks[1]]->cancel(operations[1]);  // too late: nothing happens
    awaitDone(attempt.start(0, 4));
  }
}

// Under the address sanitizer, a write after the end would be found.
void testDestructorFailsWhatIsPending() {
  World world(7);
  Team team = teamOf(7);
  auto attempt = std::make_unique<Attempt>(world, team, 100003);
  std::vector<OperationPtr> operations = attempt->start(0, 6);
  for (std::size_t i = 0; i < 6; ++i) world.ranks[team.ranks[i]].reset();
  attempt.reset();
  checkFailed(operations, "all_reduce: ");
  CHECK(operations[0]->outcome() == Outcome::kClosed);
}

void testInvalidArgumentsThrowAndTakeNoNumber() {
  World world(7);
  Attempt attempt(world, teamOf(3), 4);
  Collectives& own = *world.ranks[attempt.team.ranks[0]];
  const std::uint32_t rank = attempt.team.ranks[0];
  float data[4] = {};
  const auto reduce = [&](std::vector<std::uint32_t> ranks, std::vector<double> shares,
                          ReduceOp op = ReduceOp::kSum, double timeout_s = 1) {
    const Team team{std::move(ranks), attempt.team.group, {kUrgent, 5}, timeout_s};
    return own.allReduce(data, 4, DataType::kFloat32, op, shares, team);
  };
  CHECK_THROWS(reduce({}, {}), std::invalid_argument);
  CHECK_THROWS(reduce({rank + 1, rank + 2}, {}), std::invalid_argument);
  CHECK_THROWS(reduce({rank, 1, 1}, {}), std::invalid_argument);
  CHECK_THROWS(reduce({rank, 0xffffffff}, {}), std::invalid_argument);
  CHECK_THROWS(reduce({rank, 1}, {1}), std::invalid_argument);
  CHECK_THROWS(reduce({rank, 1}, {1, NAN}), std::invalid_argument);
  CHECK_THROWS(reduce({rank, 1}, {0.5, 0.5}, ReduceOp::kMax), std::invalid_argument);
  CHECK_THROWS(reduce({rank, 1}, {}, ReduceOp::kSum, NAN), std::invalid_argument);
  CHECK_THROWS(own.broadcast(data, 4, 99, attempt.team), std::invalid_argument);
  awaitDone(attempt.start(0, 3));
  // What the messenger refuses fails the collective only.
  const auto refused = own.allGather(data, data, 1, {{rank, 99}, 0, {kUrgent, 5}, 60});
  checkFailed({refused}, "all_gather: no rank 99");
}

void testDifferentSizesFail() {
  World world(7);
  const Team team = teamOf(2);
  Attempt small(world, team, 4), large(world, team, 5);
  auto operations = small.start(0, 1);
  operations.push_back(large.start(1, 2)[0]);
  checkFailed(operations, "all_reduce: ");
}

}  // namespace

int main() {
  testAllReduceTypesAndSizes();
  testAllReduceGivesEqualBitsEverywhereAndAlways();
  testAllReduceAveragesByShare();
  testReduceScatterSizes();
  testAllGatherSizes();
  testBroadcastFromEveryRoot();
  testBarrierHoldsUntilTheLastMemberComes();
  testConcurrentCollectivesDoNotMix();
  testLostRankEndsEverybody();
  testTimeoutEndsEverybody();
  testCancelEndsEverybody();
  testDestructorFailsWhatIsPending();
  testInvalidArgumentsThrowAndTakeNoNumber();
  testDifferentSizesFail();
  return 0;
}
