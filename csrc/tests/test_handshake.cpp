#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "../handshake.h"
#include "check.h"

namespace {

using namespace dora;

constexpr std::uint32_t kInitiator = 1, kResponder = 2;
constexpr Protection kProtections[] = {Protection::kHeader, Protection::kChecksum, Protection::kMac,
                                       Protection::kEncrypt};

Identity identity(std::uint32_t rank) {
  Identity self;
  self.key = "a key of 16 bytes or more";
  self.job = 0x1122334455667788;
  self.epoch = 5;
  self.rank = rank;
  self.lane = rank == kInitiator ? 1 : 0;
  return self;
}

// Changes message number `index` (HELLO is 0) on its way.
using Wire = std::function<void(int index, std::string& bytes)>;

struct Result {
  Handshake initiator, responder;
  Reject initiator_error = Reject::kNone, responder_error = Reject::kNone;
  bool isDone() const { return initiator.done() && responder.done(); }
};

Reject give(Handshake& side, const std::string& bytes) {
  if (bytes.empty() || side.needed() == 0) return Reject::kNone;
  CHECK(bytes.size() == side.needed());
  try {
    side.input(bytes.data(), bytes.size());
  } catch (const HandshakeError& error) {
    CHECK(!side.done() && side.needed() == 0);
    CHECK(std::strlen(error.what()) > 20);
    return error.reason;
  }
  return Reject::kNone;
}

Result run(const Identity& from, const Identity& to, const Wire& wire = nullptr,
           std::uint32_t peer_rank = kResponder) {
  Result result{Handshake::initiate(from, peer_rank), Handshake::respond(to)};
  for (int index = 0; index < 4; ++index) {
    const bool is_from_initiator = index % 2 == 0;
    std::string bytes = (is_from_initiator ? result.initiator : result.responder).output();
    if (wire && !bytes.empty()) wire(index, bytes);
    Reject& error = is_from_initiator ? result.responder_error : result.initiator_error;
    const Reject now = give(is_from_initiator ? result.responder : result.initiator, bytes);
    if (error == Reject::kNone) error = now;
  }
  return result;
}

void checkRefused(const Identity& from, const Identity& to, Reject reason) {
  const Result result = run(from, to);
  CHECK(!result.initiator.done() && !result.responder.done());
  CHECK(result.initiator_error == reason);
  CHECK(result.responder_error == reason);
}

void checkTalk(FrameCipher& sending, FrameCipher& receiving) {
  std::uint8_t fields[kFieldBytes], tag[kTagBytes];
  std::vector<std::uint8_t> payload(1000, 0x5a);
  for (std::uint8_t frame = 0; frame < 3; ++frame) {
    std::memset(fields, frame, sizeof(fields));
    sending.sealHeader(fields, tag);
    CHECK(receiving.openHeader(fields, tag));
    sending.macPayload(payload.data(), payload.size(), tag);
    CHECK(receiving.checkPayload(payload.data(), payload.size(), tag));
    sending.encryptPayload(payload.data(), payload.size(), payload.data(), tag);
    CHECK(receiving.decryptPayload(payload.data(), payload.size(), payload.data(), tag));
    CHECK(payload == std::vector<std::uint8_t>(1000, 0x5a));
  }
}

void test_handshake_succeeds_with_every_protection() {
  for (const Protection protection : kProtections) {
    Identity from = identity(kInitiator), to = identity(kResponder);
    from.protection = to.protection = protection;
    Result result = run(from, to);
    CHECK(result.isDone());
    CHECK(result.responder.claimedRank() == kInitiator && result.responder.claimedLane() == 1);
    CHECK(result.initiator.needed() == 0 && result.initiator.output().empty());
    Session near = result.initiator.session(), far = result.responder.session();
    CHECK(near.peer_rank == kResponder && far.peer_rank == kInitiator);
    CHECK(near.lane == 1 && far.lane == 1);
    CHECK(near.protection == protection && far.protection == protection);
    checkTalk(near.sending, far.receiving);
    checkTalk(far.sending, near.receiving);
  }
}

void test_handshake_brings_the_responders_clock() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  Result result = run(identity(kInitiator), identity(kResponder));
  const double clock_s = result.initiator.session().peer_clock_s;
  CHECK(std::abs(clock_s - std::chrono::duration<double>(now).count()) < 60);
  CHECK(result.responder.session().peer_clock_s == 0);
}

void test_session_is_given_once_and_only_when_done() {
  Handshake early = Handshake::initiate(identity(kInitiator), kResponder);
  CHECK_THROWS(early.session(), std::logic_error);
  Result result = run(identity(kInitiator), identity(kResponder));
  result.initiator.session();
  CHECK_THROWS(result.initiator.session(), std::logic_error);
}

void test_handshake_without_the_key_is_refused() {
  for (const char* key : {"another key of 16 bytes or more", ""}) {
    Identity from = identity(kInitiator), to = identity(kResponder);
    from.key = key;
    checkRefused(from, to, Reject::kKey);
    checkRefused(identity(kInitiator), [&] { to.key = key; return to; }(), Reject::kKey);
  }
  Identity from = identity(kInitiator), to = identity(kResponder);
  from.key = to.key = "";
  checkRefused(from, to, Reject::kKey);
}

// The responder must not rely on the initiator to notice: the PROOF comes from another exchange.
void test_handshake_replayed_proof_is_refused() {
  std::string recorded;
  CHECK(run(identity(kInitiator), identity(kResponder), [&](int index, std::string& bytes) {
          if (index == 2) recorded = bytes;
        }).isDone());
  const Result result = run(identity(kInitiator), identity(kResponder),
                            [&](int index, std::string& bytes) {
                              if (index == 2) bytes = recorded;
                            });
  CHECK(!result.responder.done() && result.responder_error == Reject::kKey);
  CHECK(!result.initiator.done() && result.initiator_error == Reject::kKey);
}

void test_handshake_replayed_initiator_is_refused() {
  std::vector<std::string> recorded;
  run(identity(kInitiator), identity(kResponder),
      [&](int, std::string& bytes) { recorded.push_back(bytes); });
  Handshake responder = Handshake::respond(identity(kResponder));
  CHECK(give(responder, recorded[0]) == Reject::kNone);
  CHECK(give(responder, recorded[2]) == Reject::kKey);
  Handshake initiator = Handshake::initiate(identity(kInitiator), kResponder);
  CHECK(give(initiator, recorded[1]) == Reject::kKey);
}

void test_handshake_reflected_messages_are_refused() {
  Identity self = identity(kInitiator);
  Handshake initiator = Handshake::initiate(self, kInitiator);
  CHECK(give(initiator, initiator.output()) != Reject::kNone);
  Handshake responder = Handshake::respond(self);
  give(responder, Handshake::initiate(self, kInitiator).output());
  CHECK(give(responder, responder.output()) != Reject::kNone);
}

void test_handshake_every_mismatch_is_named_on_both_sides() {
  const Identity from = identity(kInitiator), to = identity(kResponder);
  Identity other = to;
  ++other.job;
  checkRefused(from, other, Reject::kJob);
  other = to;
  ++other.epoch;
  checkRefused(from, other, Reject::kEpoch);
  other = to;
  other.protection = Protection::kEncrypt;
  checkRefused(from, other, Reject::kProtection);
  other = to;
  ++other.rank;
  checkRefused(from, other, Reject::kMember);
}

void test_handshake_other_version_or_magic_is_refused() {
  for (const std::size_t at : {0, 1, 2}) {
    for (const int index : {0, 1}) {
      const Result result = run(identity(kInitiator), identity(kResponder),
                                [&](int i, std::string& bytes) {
                                  if (i == index) ++bytes[at];
                                });
      CHECK(result.initiator_error == Reject::kVersion);
      CHECK(result.responder_error == Reject::kVersion);
    }
  }
}

// A responder with the key that claims another place than the one that was called.
void test_initiator_checks_the_responders_fields() {
  struct Change {
    std::size_t at;
    Reject reason;
  };
  for (const Change change : {Change{4, Reject::kMember}, Change{5, Reject::kProtection},
                              Change{8, Reject::kJob}, Change{16, Reject::kEpoch},
                              Change{20, Reject::kMember}, Change{24, Reject::kMember},
                              Change{32, Reject::kKey}, Change{64, Reject::kKey},
                              Change{72, Reject::kKey}}) {
    const Result result = run(identity(kInitiator), identity(kResponder),
                              [&](int index, std::string& bytes) {
                                if (index == 1) ++bytes[change.at];
                              });
    CHECK(result.initiator_error == change.reason && result.responder_error == change.reason);
  }
}

void test_handshake_every_flipped_bit_is_refused() {
  const std::size_t num_bits = 8 * Handshake::respond(identity(kResponder)).needed();
  for (int target = 0; target < 4; ++target) {
    for (std::size_t bit = 0; bit < num_bits; ++bit) {
      const Result result = run(identity(kInitiator), identity(kResponder),
                                [&](int index, std::string& bytes) {
                                  if (index != target) return;
                                  char& byte = bytes[bit / 8];
                                  byte = static_cast<char>(byte ^ (1 << bit % 8));
                                });
      CHECK(!result.initiator.done() && result.initiator_error != Reject::kNone);
      // Only the last message cannot be answered: the responder learns it from the closed socket.
      CHECK(result.responder.done() == (target == 3));
    }
  }
}

void test_probe_fits_any_job_epoch_and_protection() {
  for (const Protection protection : kProtections) {
    Identity probe, to = identity(kResponder);
    probe.key = to.key;
    probe.rank = kProbeRank;
    to.protection = protection;
    Result result = run(probe, to, nullptr, kProbeRank);
    CHECK(result.isDone());
    CHECK(result.responder.claimedRank() == kProbeRank);
    Session near = result.initiator.session(), far = result.responder.session();
    CHECK(near.peer_rank == kResponder && far.peer_rank == kProbeRank);
    CHECK(near.protection == protection);
    checkTalk(near.sending, far.receiving);
    checkTalk(far.sending, near.receiving);
  }
}

void test_probe_needs_the_key() {
  Identity probe;
  probe.rank = kProbeRank;
  checkRefused(probe, identity(kResponder), Reject::kKey);
  probe.key = "another key of 16 bytes or more";
  checkRefused(probe, identity(kResponder), Reject::kKey);
}

// One that skips its own check of the responder and proves with a key that it does not have.
void test_responder_demands_the_proof_of_a_probe() {
  Identity probe;
  probe.rank = kProbeRank;
  probe.key = "another key of 16 bytes or more";
  Identity same_key = identity(kResponder);
  same_key.key = probe.key;
  std::string proof;
  run(probe, same_key, [&](int index, std::string& bytes) { if (index == 2) proof = bytes; });
  Handshake responder = Handshake::respond(identity(kResponder));
  CHECK(give(responder, Handshake::initiate(probe, kResponder).output()) == Reject::kNone);
  CHECK(give(responder, proof) == Reject::kKey);
}

void test_probe_cannot_respond() {
  CHECK_THROWS(Handshake::respond(identity(kProbeRank)), std::invalid_argument);
}

void test_refuse_reaches_the_initiator() {
  Handshake initiator = Handshake::initiate(identity(kInitiator), kResponder);
  Handshake responder = Handshake::respond(identity(kResponder));
  CHECK_THROWS(responder.refuse(Reject::kMember), std::logic_error);
  CHECK(give(responder, initiator.output()) == Reject::kNone);
  CHECK_THROWS(responder.refuse(Reject::kNone), std::logic_error);
  responder.refuse(Reject::kMember);
  CHECK(responder.needed() == 0 && !responder.done());
  CHECK(give(initiator, responder.output()) == Reject::kMember);
}

void test_input_of_another_size_is_refused() {
  Handshake responder = Handshake::respond(identity(kResponder));
  const std::string bytes(responder.needed() + 1, 'x');
  CHECK_THROWS(responder.input(bytes.data(), bytes.size()), std::invalid_argument);
  CHECK_THROWS(responder.input(bytes.data(), bytes.size() - 2), std::invalid_argument);
  CHECK_THROWS(responder.input(bytes.data(), 0), std::invalid_argument);
  CHECK(give(responder, bytes.substr(1)) == Reject::kVersion);
  CHECK_THROWS(responder.input(bytes.data(), bytes.size()), std::invalid_argument);
}

void test_session_refuses_replayed_altered_and_reordered_headers() {
  Result result = run(identity(kInitiator), identity(kResponder));
  Session near = result.initiator.session(), far = result.responder.session();
  std::uint8_t fields[kFieldBytes] = {}, first[kTagBytes], second[kTagBytes], third[kTagBytes];
  near.sending.sealHeader(fields, first);
  near.sending.sealHeader(fields, second);
  near.sending.sealHeader(fields, third);
  CHECK(far.receiving.openHeader(fields, first));
  CHECK(!far.receiving.openHeader(fields, first));   // replayed; takes the second nonce
  CHECK(!far.receiving.openHeader(fields, second));  // too late
  near.sending.sealHeader(fields, first);
  fields[9] ^= 4;
  CHECK(!far.receiving.openHeader(fields, first));
  CHECK(!near.receiving.openHeader(fields, first));  // reflected
}

void test_sessions_do_not_share_keys() {
  std::vector<std::string> tags;
  for (int repeat = 0; repeat < 2; ++repeat) {
    Result result = run(identity(kInitiator), identity(kResponder));
    Session near = result.initiator.session(), far = result.responder.session();
    for (FrameCipher* sending : {&near.sending, &far.sending}) {
      std::uint8_t fields[kFieldBytes] = {}, tag[kTagBytes];
      sending->sealHeader(fields, tag);
      tags.emplace_back(tag, tag + kTagBytes);
    }
  }
  std::sort(tags.begin(), tags.end());
  CHECK(std::unique(tags.begin(), tags.end()) == tags.end());
}

void test_describe_knows_every_reason() {
  for (std::uint8_t reason = 0; reason <= 6; ++reason) {
    CHECK(std::string(describe(static_cast<Reject>(reason))) != "unknown reason");
  }
  CHECK(std::string(describe(static_cast<Reject>(7))) == "unknown reason");
}

}  // namespace

int main() {
  test_handshake_succeeds_with_every_protection();
  test_handshake_brings_the_responders_clock();
  test_session_is_given_once_and_only_when_done();
  test_handshake_without_the_key_is_refused();
  test_handshake_replayed_proof_is_refused();
  test_handshake_replayed_initiator_is_refused();
  test_handshake_reflected_messages_are_refused();
  test_handshake_every_mismatch_is_named_on_both_sides();
  test_handshake_other_version_or_magic_is_refused();
  test_initiator_checks_the_responders_fields();
  test_handshake_every_flipped_bit_is_refused();
  test_probe_fits_any_job_epoch_and_protection();
  test_probe_needs_the_key();
  test_responder_demands_the_proof_of_a_probe();
  test_probe_cannot_respond();
  test_refuse_reaches_the_initiator();
  test_input_of_another_size_is_refused();
  test_session_refuses_replayed_altered_and_reordered_headers();
  test_sessions_do_not_share_keys();
  test_describe_knows_every_reason();
}
