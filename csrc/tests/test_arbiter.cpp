#include "arbiter.h"

#include <stdexcept>
#include <vector>

#include "check.h"

namespace dora {
namespace {

using Orders = std::vector<Arbiter::Order>;

bool isAllow(const Orders& orders, std::uint32_t rank) {
  return orders.size() == 1 && orders[0].kind == Arbiter::Kind::kAllow && orders[0].rank == rank;
}

bool isRevoke(const Orders& orders, std::uint32_t rank) {
  return orders.size() == 1 && orders[0].kind == Arbiter::Kind::kRevoke && orders[0].rank == rank;
}

void testLendAndRevoke() {
  Arbiter arbiter(1);
  CHECK(isAllow(arbiter.want(7, {kGradient, 0}, 0), 7));
  CHECK(arbiter.want(8, {kGradient, 0}, 0).empty());
  CHECK(isRevoke(arbiter.want(9, {kActivation, 0}, 0), 7));
  CHECK(arbiter.want(5, {kUrgent, 0}, 0).empty());  // once per lend
  CHECK(arbiter.holder() == 7u);
  CHECK(isAllow(arbiter.giveBack(7, 0), 5));
  CHECK(isAllow(arbiter.giveBack(5, 0), 9));
  CHECK(isAllow(arbiter.giveBack(9, 0), 8));
  CHECK(arbiter.giveBack(8, 0).empty());
  CHECK(!arbiter.holder());
}

void testEqualsTakeTurns() {
  Arbiter arbiter(1);
  arbiter.want(1, {}, 0);
  CHECK(arbiter.want(2, {}, 0).empty());
  CHECK(arbiter.tick(0.9).empty());
  CHECK(isRevoke(arbiter.tick(1), 1));
  CHECK(isAllow(arbiter.giveBack(1, 1), 2));
}

void testAging() {
  Arbiter arbiter(1);
  arbiter.want(1, {kUrgent, 0}, 0);
  arbiter.want(2, {kWeights, 0}, 0);
  CHECK(arbiter.tick(1).empty());
  CHECK(arbiter.tick(2).empty());
  CHECK(arbiter.tick(3).empty());  // never past kActivation
  CHECK(arbiter.want(3, {kActivation, 0}, 3).empty());
  CHECK(isAllow(arbiter.giveBack(1, 3), 2));
}

void testLostRanks() {
  Arbiter arbiter(1);
  CHECK(arbiter.giveBack(4, 0).empty());
  arbiter.want(1, {}, 0);
  arbiter.want(2, {}, 0);
  CHECK(arbiter.giveBack(2, 0).empty());
  CHECK(arbiter.giveBack(1, 0).empty());
}

}  // namespace
}  // namespace dora

int main() {
  dora::testLendAndRevoke();
  dora::testEqualsTakeTurns();
  dora::testAging();
  dora::testLostRanks();
  CHECK_THROWS(dora::Arbiter(0), std::invalid_argument);
}
