// Mutual challenge-response authentication with a shared key, without any I/O.
//
//   initiator                                   responder
//   HELLO  version, job, epoch, rank, peer, lane, protection, nonce  ->
//          <-  CHALLENGE  the same fields of the responder, clock, nonce, proof over all of it
//   PROOF  over HELLO and CHALLENGE  ->
//          <-  VERDICT  accepted and proof over the same, or a reason
//
// All messages have one size and layout; either side may send a VERDICT with a reason instead of
// its next message, and then closes:
//
//    0 u16 magic   2 u8 version  3 u8 kind    4 u8 lane       5 u8 protection  6 u8 reason  7 zero
//    8 u64 job    16 u32 epoch  20 u32 rank  24 u32 peer rank                  28 u32 zero
//   32 u8[32] nonce             64 u64 clock in us since 1970                  72 u8[32] proof
//
// A proof is HMAC-SHA256 with a key that HKDF-SHA256 derives from the shared key; both nonces are
// fresh, so a recorded exchange proves nothing. Each direction of each connection gets a key of
// its own from HKDF over HELLO and CHALLENGE, thus over both nonces and the lane. There is no
// forward secrecy: who learns the shared key can read recorded encrypted traffic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "frame.h"

namespace dora {

enum class Reject : std::uint8_t {
  kNone = 0,
  kVersion = 1,     // other protocol version, or not Dora at all
  kJob = 2,         // another job on this port
  kEpoch = 3,       // the other side is in another epoch (may be retried)
  kProtection = 4,  // sides disagree on protection
  kMember = 5,      // the rank is not expected here
  kKey = 6,         // the proof is wrong: another key, or none
};

// One line for a user: what differs and what to do.
const char* describe(Reject reason);

struct HandshakeError : std::runtime_error {
  HandshakeError(Reject why, const std::string& what) : std::runtime_error(what), reason(why) {}
  Reject reason;
};

constexpr std::uint32_t kProbeRank = 0xffffffff;  // `dora doctor --peer`: checks, then leaves

struct Identity {
  std::string key;           // the shared secret; at least 16 bytes, checked by the caller; an
                             // empty one fits nothing, not even another empty one
  std::uint64_t job = 0;     // equal on all ranks of a job; a probe passes 0 and fits any
  std::uint32_t epoch = 0;   // a probe fits any
  std::uint32_t rank = 0;
  std::uint8_t lane = 0;     // of the initiator; the responder takes it over
  Protection protection = Protection::kChecksum;
};

struct Session {
  FrameCipher sending;
  FrameCipher receiving;
  std::uint32_t peer_rank;
  std::uint8_t lane;
  double peer_clock_s;  // the responder's wall clock when it answered; 0 on the responder
  Protection protection;  // the responder's, which a probe takes over
};

struct HandshakeMessage;

// One side of one handshake. Feed it exactly `needed()` bytes at a time, send what `output()`
// returns, until `done()`.
//
// On a failure `input` throws HandshakeError; `output()` may then still hold a VERDICT with the
// reason that should be sent before closing. `needed()` is 0 when nothing more is expected.
class Handshake {
 public:
  static Handshake initiate(const Identity& self, std::uint32_t peer_rank);
  static Handshake respond(const Identity& self);

  std::string output();
  std::size_t needed() const;
  void input(const void* data, std::size_t size);
  bool done() const;

  // On a responder: HELLO has come and PROOF has not.
  bool hasHello() const { return !is_initiator_ && state_ == State::kProof; }

  // The rank and lane that the initiator claims; valid on a responder after HELLO. The caller may
  // refuse it before anything is proven: `refuse` makes `output()` return that verdict.
  std::uint32_t claimedRank() const;
  std::uint8_t claimedLane() const;
  void refuse(Reject reason);

  // Call once, when done: two ciphers with one key would use nonces twice. Throws std::logic_error.
  Session session();

 private:
  enum class State { kHello, kChallenge, kProof, kVerdict, kDone, kFailed };  // what is awaited

  Handshake(const Identity& self, bool is_initiator);
  void readHello(const std::string& bytes);
  void readChallenge(const std::string& bytes);
  void readProof(const std::string& bytes);
  void readVerdict(const std::string& bytes);
  HandshakeMessage read(const std::string& bytes, std::uint8_t kind);
  HandshakeMessage own(std::uint8_t kind) const;
  void requireEqual(Reject reason, std::uint64_t given, std::uint64_t allowed);
  [[noreturn]] void fail(Reject reason, const std::string& detail);
  std::string proof(const std::string& label) const;
  bool isSame(const std::string& given, const std::string& expected) const;
  FrameCipher cipher(bool is_from_initiator) const;

  Identity self_;
  bool is_initiator_;
  State state_;
  std::uint32_t peer_rank_ = kProbeRank;
  std::uint64_t peer_clock_us_ = 0;
  std::string hello_, challenge_;  // as sent; what the proofs and the keys depend on
  std::string output_;
};

}  // namespace dora
