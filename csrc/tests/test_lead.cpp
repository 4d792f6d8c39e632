// Who runs the event loop: never two, and never nobody for long.
#include "lead.h"

#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "check.h"

using namespace dora;

namespace {

void testTurns() {
  Lead lead;
  CHECK(!lead.isWanted());
  CHECK(!lead.tryTake());
  CHECK(lead.isWanted());
  lead.open();
  CHECK(!lead.isWanted());
  CHECK(lead.tryTake());
  CHECK(!lead.tryTake());  // a second caller
  CHECK(!lead.isWanted());
  lead.recall();  // somebody has it: no effect
  lead.leave(false);
  CHECK(lead.tryTake());
  lead.leave(true);
  CHECK(!lead.tryTake());
  lead.standBy();
}

void testComesBack() {
  Lead lead;
  lead.open();
  lead.recall();
  CHECK(!lead.tryTake());
  lead.standBy();
  lead.open();
  lead.standBy();  // nobody comes
  CHECK(!lead.tryTake());
}

// After a long turn the I/O thread is asleep, and wakes up however the caller leaves.
void testLongTurn() {
  for (bool is_needed : {false, true}) {
    Lead lead;
    lead.open();
    CHECK(lead.tryTake());
    std::thread io([&] { lead.standBy(); });
    ::usleep(5000);
    lead.leave(is_needed);
    io.join();
    CHECK(!lead.tryTake());
  }
}

// Whoever has the lead writes `turns` without a lock: the sanitizer sees it if two have it.
void testExclusion() {
  constexpr int kTurns = 2000;
  Lead lead;
  long turns = 0;
  std::atomic<long> taken{0};
  std::atomic<int> num_callers{3};
  std::vector<std::thread> callers;
  for (unsigned i = 0; i < 3; ++i) {
    callers.emplace_back([&, i] {
      for (int n = 0; n < kTurns; ++n) {
        if (n % 97 == 0) ::usleep(300);
        if (n % 5 == 0) lead.recall();
        if (!lead.tryTake()) continue;
        ++turns;
        ++taken;
        if (n % 301 == 0) ::usleep(500);
        lead.leave((n + i) % 3 == 0);
      }
      --num_callers;
    });
  }
  while (num_callers > 0) {
    ++turns;
    ++taken;
    if (!lead.isWanted()) continue;
    lead.open();
    lead.standBy();
  }
  for (auto& caller : callers) caller.join();
  CHECK(turns == taken);
}

}  // namespace

int main() {
  testTurns();
  testComesBack();
  testLongTurn();
  testExclusion();
  return 0;
}
