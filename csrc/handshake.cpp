#include "handshake.h"

#include <algorithm>
#include <chrono>

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/rand.h>

namespace dora {

struct HandshakeMessage {
  std::uint8_t kind = 0;
  std::uint8_t lane = 0;
  std::uint8_t protection = 0;
  std::uint8_t reason = 0;
  std::uint64_t job = 0;
  std::uint32_t epoch = 0;
  std::uint32_t rank = 0;
  std::uint32_t peer_rank = 0;
  std::string nonce = std::string(32, '\0');
  std::uint64_t clock_us = 0;
  std::string proof = std::string(32, '\0');
};

namespace {

enum Kind : std::uint8_t { kHello = 1, kChallenge = 2, kProof = 3, kVerdict = 4 };

constexpr std::size_t kHashBytes = 32;
constexpr std::size_t kProofAt = 72;
constexpr std::size_t kMessageBytes = kProofAt + kHashBytes;

std::string encode(const HandshakeMessage& message) {
  std::uint8_t out[kMessageBytes] = {};
  storeLittle(kMagic, out);
  out[2] = kProtocolVersion;
  out[3] = message.kind;
  out[4] = message.lane;
  out[5] = message.protection;
  out[6] = message.reason;
  storeLittle(message.job, out + 8);
  storeLittle(message.epoch, out + 16);
  storeLittle(message.rank, out + 20);
  storeLittle(message.peer_rank, out + 24);
  std::copy(message.nonce.begin(), message.nonce.end(), out + 32);
  storeLittle(message.clock_us, out + 64);
  std::copy(message.proof.begin(), message.proof.end(), out + kProofAt);
  return std::string(out, out + kMessageBytes);
}

// Reads all fields but magic, version and the zero bytes: encoding the result again finds those.
HandshakeMessage decode(const std::string& bytes) {
  const auto* in = reinterpret_cast<const std::uint8_t*>(bytes.data());
  HandshakeMessage message;
  message.kind = in[3];
  message.lane = in[4];
  message.protection = in[5];
  message.reason = in[6];
  message.job = loadLittle<std::uint64_t>(in + 8);
  message.epoch = loadLittle<std::uint32_t>(in + 16);
  message.rank = loadLittle<std::uint32_t>(in + 20);
  message.peer_rank = loadLittle<std::uint32_t>(in + 24);
  message.nonce = bytes.substr(32, 32);
  message.clock_us = loadLittle<std::uint64_t>(in + 64);
  message.proof = bytes.substr(kProofAt);
  return message;
}

std::string encodeVerdict(Reject reason, const std::string& proof = std::string(32, '\0')) {
  HandshakeMessage message;
  message.kind = kVerdict;
  message.reason = static_cast<std::uint8_t>(reason);
  message.proof = proof;
  return encode(message);
}

std::string encodeProof(const std::string& proof) {
  HandshakeMessage message;
  message.kind = kProof;
  message.proof = proof;
  return encode(message);
}

std::string randomNonce() {
  std::uint8_t nonce[32];
  if (RAND_bytes(nonce, sizeof(nonce)) != 1) {
    throw std::runtime_error("OpenSSL has no random numbers");
  }
  return std::string(nonce, nonce + sizeof(nonce));
}

std::uint64_t wallClockUs() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::microseconds>(now).count());
}

std::string hmacSha256(const std::string& key, const std::string& text) {
  std::uint8_t out[kHashBytes];
  std::size_t size = 0;
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(text.data());
  if (EVP_Q_mac(nullptr, "HMAC", nullptr, "SHA256", nullptr, key.data(), key.size(), bytes,
                text.size(), out, sizeof(out), &size) == nullptr ||
      size != kHashBytes) {
    throw std::runtime_error("OpenSSL offers no HMAC-SHA256");
  }
  return std::string(out, out + kHashBytes);
}

// HKDF-SHA256 (RFC 5869) for one block of output: extract, then expand.
std::string deriveKey(const std::string& secret, const std::string& salt, const std::string& info) {
  return hmacSha256(hmacSha256(salt, secret), info + '\x01');
}

}  // namespace

const char* describe(Reject reason) {
  switch (reason) {
    case Reject::kNone:
      return "accepted";
    case Reject::kVersion:
      return "other protocol version, or not Dora: check host and port, and install one version "
             "of Dora on all devices";
    case Reject::kJob:
      return "the other side belongs to another job: use one job number, or another port";
    case Reject::kEpoch:
      return "the other side is in another epoch of the membership: try again when it has changed";
    case Reject::kProtection:
      return "the sides disagree on protection: set the same one on all ranks";
    case Reject::kMember:
      return "this rank is not expected here: check the ranks and their addresses";
    case Reject::kKey:
      return "the keys differ, or one is missing: give all ranks the same key";
  }
  return "unknown reason";
}

Handshake::Handshake(const Identity& self, bool is_initiator)
    : self_(self),
      is_initiator_(is_initiator),
      state_(is_initiator ? State::kChallenge : State::kHello) {}

Handshake Handshake::initiate(const Identity& self, std::uint32_t peer_rank) {
  Handshake handshake(self, true);
  handshake.peer_rank_ = peer_rank;
  handshake.hello_ = encode(handshake.own(kHello));
  handshake.output_ = handshake.hello_;
  return handshake;
}

Handshake Handshake::respond(const Identity& self) {
  if (self.rank == kProbeRank) throw std::invalid_argument("a probe must initiate, not respond");
  return Handshake(self, false);
}

std::string Handshake::output() {
  std::string bytes;
  bytes.swap(output_);
  return bytes;
}

bool Handshake::done() const { return state_ == State::kDone; }

std::size_t Handshake::needed() const {
  return state_ == State::kDone || state_ == State::kFailed ? 0 : kMessageBytes;
}

std::uint32_t Handshake::claimedRank() const { return peer_rank_; }

std::uint8_t Handshake::claimedLane() const { return self_.lane; }

void Handshake::refuse(Reject reason) {
  if (state_ != State::kProof || reason == Reject::kNone) {
    throw std::logic_error("refuse() needs a reason, on a responder between HELLO and PROOF");
  }
  state_ = State::kFailed;
  output_ = encodeVerdict(reason);
}

void Handshake::input(const void* data, std::size_t size) {
  if (size != needed() || size == 0) {
    throw std::invalid_argument("handshake: given " + std::to_string(size) + " bytes, needed are " +
                                std::to_string(needed()));
  }
  const std::string bytes(static_cast<const char*>(data), size);
  if (state_ == State::kHello) return readHello(bytes);
  if (state_ == State::kChallenge) return readChallenge(bytes);
  if (state_ == State::kProof) return readProof(bytes);
  readVerdict(bytes);
}

void Handshake::readHello(const std::string& bytes) {
  const HandshakeMessage hello = read(bytes, kHello);
  requireEqual(Reject::kVersion, hello.clock_us, 0);
  if (hello.proof != HandshakeMessage().proof) fail(Reject::kVersion, "HELLO with a proof");
  peer_rank_ = hello.rank;
  if (hello.rank != kProbeRank) {
    requireEqual(Reject::kJob, hello.job, self_.job);
    requireEqual(Reject::kEpoch, hello.epoch, self_.epoch);
    requireEqual(Reject::kProtection, hello.protection,
                 static_cast<std::uint8_t>(self_.protection));
    requireEqual(Reject::kMember, hello.peer_rank, self_.rank);
  }
  self_.lane = hello.lane;
  hello_ = bytes;
  HandshakeMessage challenge = own(kChallenge);
  challenge.clock_us = wallClockUs();
  challenge_ = encode(challenge);
  challenge_.replace(kProofAt, kHashBytes, proof("responder"));  // over a CHALLENGE without proof
  output_ = challenge_;
  state_ = State::kProof;
}

void Handshake::readChallenge(const std::string& bytes) {
  const HandshakeMessage challenge = read(bytes, kChallenge);
  if (self_.rank == kProbeRank) {
    if (challenge.protection > static_cast<std::uint8_t>(Protection::kEncrypt)) {
      fail(Reject::kProtection, "given " + std::to_string(challenge.protection));
    }
  } else {
    requireEqual(Reject::kJob, challenge.job, self_.job);
    requireEqual(Reject::kEpoch, challenge.epoch, self_.epoch);
    requireEqual(Reject::kProtection, challenge.protection,
                 static_cast<std::uint8_t>(self_.protection));
    requireEqual(Reject::kMember, challenge.rank, peer_rank_);
  }
  requireEqual(Reject::kMember, challenge.peer_rank, self_.rank);
  requireEqual(Reject::kMember, challenge.lane, self_.lane);
  challenge_ = bytes.substr(0, kProofAt) + std::string(kHashBytes, '\0');
  if (!isSame(challenge.proof, proof("responder"))) fail(Reject::kKey, "in CHALLENGE");
  challenge_ = bytes;
  self_.protection = static_cast<Protection>(challenge.protection);
  peer_rank_ = challenge.rank;
  peer_clock_us_ = challenge.clock_us;
  output_ = encodeProof(proof("initiator"));
  state_ = State::kVerdict;
}

void Handshake::readProof(const std::string& bytes) {
  read(bytes, kProof);
  if (!isSame(bytes, encodeProof(proof("initiator")))) fail(Reject::kKey, "in PROOF");
  output_ = encodeVerdict(Reject::kNone, proof("accepted"));
  state_ = State::kDone;
}

void Handshake::readVerdict(const std::string& bytes) {
  read(bytes, kVerdict);
  if (!isSame(bytes, encodeVerdict(Reject::kNone, proof("accepted")))) {
    fail(Reject::kKey, "in VERDICT");
  }
  state_ = State::kDone;
}

// A VERDICT with a reason may come instead of anything.
HandshakeMessage Handshake::read(const std::string& bytes, std::uint8_t kind) {
  const HandshakeMessage message = decode(bytes);
  const bool is_reason = message.reason >= static_cast<std::uint8_t>(Reject::kVersion) &&
                         message.reason <= static_cast<std::uint8_t>(Reject::kKey);
  const auto reason = static_cast<Reject>(message.reason);
  if (is_reason && bytes == encodeVerdict(reason)) {
    state_ = State::kFailed;
    output_.clear();
    throw HandshakeError(reason, std::string("handshake: the peer refused: ") + describe(reason));
  }
  if (encode(message) != bytes) fail(Reject::kVersion, "unknown magic, version or zero bytes");
  requireEqual(Reject::kVersion, message.kind, kind);
  requireEqual(Reject::kVersion, message.reason, 0);
  return message;
}

HandshakeMessage Handshake::own(std::uint8_t kind) const {
  HandshakeMessage message;
  message.kind = kind;
  message.lane = self_.lane;
  message.protection = static_cast<std::uint8_t>(self_.protection);
  message.job = self_.job;
  message.epoch = self_.epoch;
  message.rank = self_.rank;
  message.peer_rank = peer_rank_;
  message.nonce = randomNonce();
  return message;
}

void Handshake::requireEqual(Reject reason, std::uint64_t given, std::uint64_t allowed) {
  if (given != allowed) {
    fail(reason, "given " + std::to_string(given) + ", allowed " + std::to_string(allowed));
  }
}

void Handshake::fail(Reject reason, const std::string& detail) {
  const bool is_peer_waiting = state_ != State::kVerdict;  // else it is done and expects frames
  output_ = is_peer_waiting ? encodeVerdict(reason) : "";
  state_ = State::kFailed;
  throw HandshakeError(reason, std::string("handshake: ") + describe(reason) + " (" + detail + ")");
}

std::string Handshake::proof(const std::string& label) const {
  return hmacSha256(deriveKey(self_.key, "dora 1", "proof"), label + hello_ + challenge_);
}

// In constant time. Without a key nothing is proven.
bool Handshake::isSame(const std::string& given, const std::string& expected) const {
  return !self_.key.empty() && given.size() == expected.size() &&
         CRYPTO_memcmp(given.data(), expected.data(), given.size()) == 0;
}

FrameCipher Handshake::cipher(bool is_from_initiator) const {
  const std::string transcript = hello_ + challenge_;
  const std::string sender = is_from_initiator ? "initiator" : "responder";
  const std::string key_bytes = deriveKey(self_.key, transcript, sender + " key");
  const std::string salt_bytes = deriveKey(self_.key, transcript, sender + " salt");
  FrameCipher::Key key;
  FrameCipher::Salt salt;
  std::copy_n(key_bytes.begin(), key.size(), key.begin());
  std::copy_n(salt_bytes.begin(), salt.size(), salt.begin());
  return FrameCipher(key, salt);
}

Session Handshake::session() {
  if (!done() || hello_.empty()) throw std::logic_error("session() needs a handshake that is done");
  Session session{cipher(is_initiator_), cipher(!is_initiator_), peer_rank_, self_.lane,
                  static_cast<double>(peer_clock_us_) * 1e-6, self_.protection};
  hello_.clear();
  return session;
}

}  // namespace dora
