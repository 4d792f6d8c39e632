// The wire format: fixed 64-byte headers, CRC32C, and the keys that protect one connection.
//
//   header (48 B, little-endian) | header tag (16 B) | payload (length B) | payload tag (0 or 16 B)
//
//    0 u16 magic   2 u8 version  3 u8 type   4 u8 class  5 u8 flags  6 u16 zero
//    8 u32 group  12 i32 tag    16 u64 seq  24 u64 offset  32 u64 total  40 u32 length  44 u32 crc
//
// The header tag is AES-256-GCM's over the 48 header bytes as associated data; its nonce counts
// frames, so a replayed, reordered or altered header is refused before any field is used.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

struct evp_cipher_ctx_st;

namespace dora {

constexpr std::size_t kFieldBytes = 48;
constexpr std::size_t kTagBytes = 16;
constexpr std::size_t kHeaderBytes = kFieldBytes + kTagBytes;
constexpr std::uint32_t kMaxPayloadBytes = 1u << 20;
constexpr std::uint16_t kMagic = 0x4f44;  // "DO" on the wire
constexpr std::uint8_t kProtocolVersion = 1;

// Bytes from a peer that break the protocol; the message names the field, given and allowed.
struct ProtocolError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class FrameType : std::uint8_t {
  kData = 1,     // payload of message (group, tag, seq) at `offset` of `total`
  kGrant = 2,    // the receiver has memory for that message: send it
  kRequest = 3,  // the sender has no eager credit for that message: grant it when you can
  kCancel = 4,   // that message will not be sent, or not be received; payload: the reason
  kCredit = 5,   // `total` more bytes of unexpected data may come
  kAck = 6,      // `total` payload bytes of this peer's bulk lane have arrived, cumulative
  kPing = 7,     // `seq` and `total` come back in the pong
  kPong = 8,
  kWant = 9,     // the sender asks for medium `group` with class and deadline (bits in `total`)
  kAllow = 10,   // the arbiter lends medium `group`
  kRevoke = 11,  // the arbiter wants medium `group` back
  kReturn = 12,  // the sender gives medium `group` back, or wants it no longer
  kBye = 13,     // orderly end
};
constexpr std::uint8_t kLastFrameType = 13;

enum FrameFlag : std::uint8_t {
  kFlagEager = 1,   // kData, kCancel: sent before a grant, counts against the eager credit
  kFlagAckMe = 2,   // the sender wants an acknowledgement now
  kFlagToSender = 4,  // kCancel: the receiver of the message cancelled, not its sender
};
constexpr std::uint8_t kAllFlags = 7;

struct FrameHeader {
  FrameType type = FrameType::kPing;
  std::uint8_t traffic_class = 0;
  std::uint8_t flags = 0;
  std::uint32_t group = 0;
  std::int32_t tag = 0;
  std::uint64_t seq = 0;
  std::uint64_t offset = 0;
  std::uint64_t total = 0;
  std::uint32_t length = 0;
  std::uint32_t crc = 0;
};

// Unsigned integers as they are on the wire, on any endianness and alignment.
template <typename T>
void storeLittle(T value, std::uint8_t* out) {
  for (std::size_t i = 0; i < sizeof(T); ++i) out[i] = static_cast<std::uint8_t>(value >> (8 * i));
}

template <typename T>
T loadLittle(const std::uint8_t* in) {
  T value = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i) value |= static_cast<T>(T{in[i]} << (8 * i));
  return value;
}

// Writes the 48 field bytes. Safe on any endianness and alignment.
void encodeFields(const FrameHeader& header, std::uint8_t* out);

// Reads and checks the 48 field bytes: magic, version, type, flags, class, zero bytes,
// length <= kMaxPayloadBytes, offset + length <= total for data without overflow, no payload
// where the type has none (only kData and kCancel have one; kCancel's is at most 512 bytes).
// Throws ProtocolError.
FrameHeader decodeFields(const std::uint8_t* in);

// CRC32C (Castagnoli) of `size` bytes, continuing from `crc`: hardware instructions of SSE4.2 or
// ARMv8 where the processor has them, tables elsewhere; chosen at run time.
std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc = 0);

// The same with tables only, so that a test can compare the two on any processor.
std::uint32_t crc32cByTable(const void* data, std::size_t size, std::uint32_t crc = 0);

// How payloads are protected; headers always carry a tag.
enum class Protection : std::uint8_t {
  kHeader = 0,    // payload unchecked
  kChecksum = 1,  // CRC32C in the header: finds accidents, not attackers
  kMac = 2,       // a GCM tag over the payload
  kEncrypt = 3,   // AES-256-GCM
};

// The key of one direction of one connection; counts its frames.
//
// Not thread-safe. Every header is sealed (or opened) exactly once and in wire order; after a
// header with `length` > 0 the payload follows, when the protection is kMac or kEncrypt. Each call
// takes the next nonce, a failed one too: after a failure the connection is lost.
class FrameCipher {
 public:
  using Key = std::array<std::uint8_t, 32>;
  using Salt = std::array<std::uint8_t, 4>;  // nonce = salt | 8 counter bytes

  FrameCipher(const Key& key, const Salt& salt);
  ~FrameCipher();
  FrameCipher(FrameCipher&&) noexcept;
  FrameCipher& operator=(FrameCipher&&) noexcept;

  void sealHeader(const std::uint8_t* fields, std::uint8_t* tag);
  bool openHeader(const std::uint8_t* fields, const std::uint8_t* tag);

  // Tag over a payload that stays readable. Throws std::invalid_argument, as all payload calls do,
  // for more than kMaxPayloadBytes.
  void macPayload(const void* data, std::size_t size, std::uint8_t* tag);
  bool checkPayload(const void* data, std::size_t size, const std::uint8_t* tag);

  // `out` may be `in`. A payload that fails leaves zeros in `out`.
  void encryptPayload(const void* in, std::size_t size, void* out, std::uint8_t* tag);
  bool decryptPayload(const void* in, std::size_t size, void* out, const std::uint8_t* tag);

 private:
  struct Free {
    void operator()(evp_cipher_ctx_st* context) const;
  };
  std::array<std::uint8_t, 12> nextNonce();

  std::unique_ptr<evp_cipher_ctx_st, Free> seal_;  // also computes the tags that are compared
  std::unique_ptr<evp_cipher_ctx_st, Free> open_;  // decrypts
  Salt salt_;
  std::uint64_t counter_ = 0;
};

}  // namespace dora
