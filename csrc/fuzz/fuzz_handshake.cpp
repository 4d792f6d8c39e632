// The first byte picks who reads the rest: an initiator, a responder, or both sides of a real
// exchange, whose messages are changed by it. Nobody gets through without the key.
#include <algorithm>
#include <cstdlib>
#include <string>

#include "../handshake.h"

namespace {

using dora::Handshake;

void require(bool condition) {
  if (!condition) std::abort();
}

dora::Identity identity(std::uint32_t rank) {
  dora::Identity self;
  self.key = "a key for fuzzing";
  self.rank = rank;
  return self;
}

// Takes up to `size` bytes off the front of `rest`.
std::string take(std::string& rest, std::size_t size) {
  const std::string bytes = rest.substr(0, size);
  rest.erase(0, size);
  return bytes;
}

bool give(Handshake& side, const std::string& bytes) {
  try {
    side.input(bytes.data(), bytes.size());
    return true;
  } catch (const dora::HandshakeError& error) {
    require(error.reason != dora::Reject::kNone && side.needed() == 0 && !side.done());
    return false;
  }
}

void readArbitrary(Handshake side, std::string rest) {
  while (side.needed() != 0 && rest.size() >= side.needed()) {
    give(side, take(rest, side.needed()));
    require(side.output().size() <= 4096);
    require(!side.done());
  }
}

// Sends the output of one side to the other, changed; false when nothing more can come.
bool pass(Handshake& from, Handshake& to, std::string& rest, bool& is_changed) {
  std::string bytes = from.output();
  const std::string change = take(rest, bytes.size());
  for (std::size_t i = 0; i < change.size(); ++i) {
    bytes[i] = static_cast<char>(bytes[i] ^ change[i]);
    is_changed |= change[i] != 0;
  }
  return bytes.size() == to.needed() && !bytes.empty() && give(to, bytes);
}

void changeExchange(std::uint32_t rank, std::string rest) {
  Handshake initiator = Handshake::initiate(identity(rank), 2);
  Handshake responder = Handshake::respond(identity(2));
  bool is_changed = false;
  for (int index = 0; index < 4; ++index) {
    const bool is_forward = index % 2 == 0;
    if (!pass(is_forward ? initiator : responder, is_forward ? responder : initiator, rest,
              is_changed)) {
      break;
    }
  }
  require(initiator.done() == !is_changed);
  if (initiator.done()) {
    require(responder.done());
    initiator.session();
    responder.session();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::string rest(data + 1, data + std::min<std::size_t>(size, 1024));
  const std::uint32_t rank = data[0] & 4 ? dora::kProbeRank : 1;
  if ((data[0] & 3) == 0) readArbitrary(Handshake::initiate(identity(rank), 2), rest);
  if ((data[0] & 3) == 1) readArbitrary(Handshake::respond(identity(2)), rest);
  if ((data[0] & 3) >= 2) changeExchange(rank, rest);
  return 0;
}
