// Engines of one process over loopback, driven from several threads: for the sanitizers.
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "collectives.h"
#include "engine.h"

using namespace dora;

namespace {

constexpr double kLimitS = 30;

using Engines = std::vector<std::shared_ptr<Engine>>;

Engines makeEngines(std::uint32_t count, EngineOptions options) {
  Engines engines;
  options.key = std::string(32, 'k');
  options.host = "127.0.0.1";
  for (options.rank = 0; options.rank < count; ++options.rank) {
    engines.push_back(std::make_shared<Engine>(options));
  }
  return engines;
}

void connectAll(const Engines& engines, bool has_medium) {
  for (const auto& engine : engines) {
    std::map<std::uint32_t, PeerAddress> peers;
    MediaOptions media;
    for (const auto& other : engines) {
      if (other == engine) continue;
      peers[other->rank()] = {"127.0.0.1", other->port()};
      if (has_medium) media.media[other->rank()] = {0};
    }
    if (has_medium) media.arbiters[0] = 0;
    engine->connect(peers, media, {});
  }
  for (const auto& engine : engines) CHECK(engine->waitConnected(kLimitS).empty());
}

struct Message {
  std::vector<std::uint8_t> sent, received;
  OperationPtr send, receive;
};

// Posts both ends of random messages between all pairs, cancels a few, checks every byte.
void exchange(const Engines& engines, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Message> messages(120);
  for (Message& m : messages) {
    std::uint32_t src = random() % engines.size();
    std::uint32_t dst = (src + 1 + random() % (engines.size() - 1)) % engines.size();
    std::size_t size = random() % 5 == 0 ? random() % 600000 : random() % 3000;
    m.sent.resize(size);
    for (auto& byte : m.sent) byte = static_cast<std::uint8_t>(random());
    m.received.resize(size);
    MessageKey key{seed, static_cast<std::int32_t>(random() % 3), kCounted};
    Priority priority{static_cast<std::uint8_t>(1 + random() % 4), double(random() % 10)};
    auto send = [&] {
      m.send = engines[src]->send(m.sent.data(), size, dst, key, priority, kLimitS);
    };
    auto receive = [&] {
      m.receive = engines[dst]->receive(m.received.data(), size, static_cast<int>(src), key,
                                        kLimitS);
    };
    // One thread posts the messages of one key in order; ends may come in either order.
    if (random() % 2) {
      send();
      receive();
    } else {
      receive();
      send();
    }
    if (random() % 16 == 0) engines[src]->cancel(m.send);
    if (random() % 16 == 0) engines[dst]->cancel(m.receive);
    if (random() % 8 == 0) engines[src]->reprioritise(m.send, {2, 0});
  }
  for (Message& m : messages) {
    CHECK(m.send->wait(kLimitS));
    CHECK(m.receive->wait(kLimitS));
    if (m.receive->outcome() == Outcome::kDone) CHECK(m.sent == m.received);
    CHECK(m.receive->outcome() != Outcome::kTimedOut);
  }
}

void testRandomTraffic(Protection protection, bool has_medium) {
  EngineOptions options;
  options.protection = protection;
  options.log_frames = 100;
  options.eager_credit_bytes = 256 * 1024;
  Engines engines = makeEngines(3, options);
  connectAll(engines, has_medium);
  std::vector<std::thread> threads;
  for (unsigned seed = 1; seed <= 3; ++seed) threads.emplace_back(exchange, engines, seed);
  for (const auto& engine : engines) (void)engine->stats();
  for (auto& thread : threads) thread.join();
  for (const auto& engine : engines) CHECK(engine->stats().protocol_errors == 0);
}

// The same on emulated media whose rates change, and which are down for moments.
void testEmulatedMedia(Protection protection) {
  char path[] = "/tmp/dora-engine-XXXXXX";
  ::close(::mkstemp(path));
  BucketTable table{3, {20e6, 5e6}, {}};
  for (std::uint32_t src = 0; src < 3; ++src) {
    for (std::uint32_t dst = 0; dst < 3; ++dst) table.paths[{src, dst}] = {0, 0, 1};
  }
  Buckets::create(path, table, nowS());
  Buckets buckets(path);
  EngineOptions options;
  options.protection = protection;
  options.buckets = path;
  Engines engines = makeEngines(3, options);
  ::unlink(path);
  connectAll(engines, true);
  std::vector<std::thread> threads;
  for (unsigned seed = 1; seed <= 3; ++seed) threads.emplace_back(exchange, engines, seed);
  for (double rate : {0.0, 1e6, 0.0, 1e3, 1e9}) {
    buckets.setRate(1, rate, nowS());
    ::usleep(30000);
  }
  for (auto& thread : threads) thread.join();
  std::uint64_t sent = 0, received = 0;
  for (const auto& engine : engines) {
    CHECK(engine->stats().protocol_errors == 0);
    sent += buckets.sentBytes(engine->rank());
    received += buckets.receivedBytes(engine->rank());
    CHECK(buckets.hasJoined(engine->rank()));
  }
  CHECK(received <= sent && buckets.carriedBytes(0) == 2 * sent && buckets.carriedBytes(1) == sent);
}

void testCollectives() {
  Engines engines = makeEngines(3, {});
  connectAll(engines, false);
  std::vector<std::unique_ptr<Collectives>> teams;
  std::vector<std::vector<float>> data(3, std::vector<float>(400000, 1.5f));
  std::vector<OperationPtr> done;
  for (std::uint32_t rank = 0; rank < 3; ++rank) {
    teams.push_back(std::make_unique<Collectives>(engines[rank], rank));
  }
  Team team;
  team.ranks = {0, 1, 2};
  for (std::uint32_t rank = 0; rank < 3; ++rank) {
    done.push_back(teams[rank]->allReduce(data[rank].data(), data[rank].size(),
                                          DataType::kFloat32, ReduceOp::kSum, {}, team));
    done.push_back(teams[rank]->barrier(team));
  }
  for (auto& operation : done) {
    CHECK(operation->wait(kLimitS));
    CHECK(operation->outcome() == Outcome::kDone);
  }
  for (auto& values : data) {
    for (float value : values) CHECK(value == 4.5f);
  }
}

void testCloseWithOperationsPending() {
  Engines engines = makeEngines(2, {});
  connectAll(engines, false);
  std::vector<std::uint8_t> memory(1 << 20);
  auto receive = engines[0]->receive(memory.data(), memory.size(), 1, {}, 1e9);
  auto other = engines[1]->receive(memory.data(), memory.size(), 0, {}, 1e9);
  engines[0]->close(0);
  CHECK(receive->wait(1));
  CHECK(receive->outcome() == Outcome::kClosed);
  CHECK(other->wait(kLimitS));
  CHECK(other->outcome() == Outcome::kPeerLost);
  CHECK_THROWS(engines[0]->receive(memory.data(), 1, 1, {}, 1), std::runtime_error);
}

// Answers each message, or sends and awaits the answer; waits of all kinds take turns.
void playPingPong(Engine& engine, bool is_first, std::int32_t tag, int count) {
  std::uint32_t peer = is_first ? 1 : 0;
  std::vector<std::uint8_t> sent(4096), received(4096);
  MessageKey key{7, tag, kCounted};
  auto send = [&](int i) {
    sent.assign(sent.size(), static_cast<std::uint8_t>(i));
    return engine.send(sent.data(), sent.size(), peer, key, {1, 0}, kLimitS);
  };
  auto await = [&](const OperationPtr& receive, int i) {
    if (i % 7 == 0) receive->wait(1e-4);
    if (i % 11 == 0) receive->notify(std::make_shared<CompletionQueue>());
    if (i % 13 == 0) engine.stats();
    CHECK(receive->wait(kLimitS));
    CHECK(receive->outcome() == Outcome::kDone);
    CHECK(received.front() == static_cast<std::uint8_t>(i));
    CHECK(received.back() == static_cast<std::uint8_t>(i));
  };
  for (int i = 0; i < count; ++i) {
    auto receive = engine.receive(received.data(), received.size(), static_cast<int>(peer), key,
                                  kLimitS);
    if (!is_first) await(receive, i);
    auto send_ended = send(i);
    if (is_first) await(receive, i);
    CHECK(send_ended->wait(kLimitS));
    if (i % 50 == 0) ::usleep(1000);  // the I/O thread resumes the lead
  }
}

// Callers lead the loop: alone, and then several of them who compete for it.
void testPingPong() {
  EngineOptions options;
  options.heartbeat_s = 0.01;
  options.dead_s = 5;
  Engines engines = makeEngines(2, options);
  connectAll(engines, false);
  for (int num_pairs : {1, 3}) {
    std::vector<std::thread> threads;
    for (int tag = 0; tag < num_pairs; ++tag) {
      for (bool is_first : {true, false}) {
        Engine& engine = *engines[is_first ? 0 : 1];
        threads.emplace_back([&engine, is_first, tag] { playPingPong(engine, is_first, tag, 500); });
      }
    }
    for (auto& thread : threads) thread.join();
  }
  for (const auto& engine : engines) CHECK(engine->stats().protocol_errors == 0);
}

// One who leads the loop while he waits hears of the end of the engine and of the peer, keeps to the
// time limits of his wait and of the operation, and is no obstacle to others.
void testEndsWhileCallersLead() {
  for (int round = 0; round < 8; ++round) {
    Engines engines = makeEngines(2, {});
    connectAll(engines, false);
    std::thread first([&] { playPingPong(*engines[0], true, 0, 40); });
    playPingPong(*engines[1], false, 0, 40);
    first.join();
    std::vector<std::uint8_t> memory(4096);
    MessageKey key{8, 0, kCounted};
    auto lasting = engines[0]->receive(memory.data(), memory.size(), 1, key, 1e9);
    CHECK(!lasting->wait(1e-3));
    auto brief = engines[0]->receive(memory.data(), memory.size(), 1, key, 0.02);
    CHECK(brief->wait(kLimitS));
    CHECK(brief->outcome() == Outcome::kTimedOut);
    auto other = engines[1]->receive(memory.data(), memory.size(), 0, key, 1e9);
    std::thread waiter([&] { CHECK(lasting->wait(kLimitS)); });
    std::thread other_waiter([&] { CHECK(other->wait(kLimitS)); });
    if (round % 2) ::usleep(2000);
    engines[0]->close(round % 4 < 2 ? 0 : 0.01);
    waiter.join();
    other_waiter.join();
    CHECK(lasting->outcome() == Outcome::kClosed);
    CHECK(other->outcome() == Outcome::kPeerLost);
  }
}

}  // namespace

int main() {
  testRandomTraffic(Protection::kChecksum, false);
  testRandomTraffic(Protection::kEncrypt, false);
  testRandomTraffic(Protection::kMac, true);
  testEmulatedMedia(Protection::kHeader);
  testEmulatedMedia(Protection::kEncrypt);
  testCollectives();
  testCloseWithOperationsPending();
  testPingPong();
  testEndsWhileCallersLead();
  return 0;
}
