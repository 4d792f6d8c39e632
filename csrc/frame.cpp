#include "frame.h"

#include <cstring>
#include <new>

#include <openssl/crypto.h>
#include <openssl/evp.h>

#include "send_queue.h"

namespace dora {
namespace {

constexpr std::uint32_t kMaxReasonBytes = 512;

[[noreturn]] void refuseField(const char* field, std::uint64_t given, const std::string& allowed) {
  throw ProtocolError(std::string("frame field ") + field + ": given " + std::to_string(given) +
                      ", allowed " + allowed);
}

void requireAtMost(const char* field, std::uint64_t given, std::uint64_t most) {
  if (given > most) refuseField(field, given, "0 to " + std::to_string(most));
}

void requireEqual(const char* field, std::uint64_t given, std::uint64_t allowed) {
  if (given != allowed) refuseField(field, given, std::to_string(allowed));
}

std::uint32_t maxLength(FrameType type) {
  if (type == FrameType::kData) return kMaxPayloadBytes;
  return type == FrameType::kCancel ? kMaxReasonBytes : 0;
}

void requireOk(int result, const char* action) {
  if (result != 1) throw std::runtime_error(std::string("OpenSSL could not ") + action);
}

int payloadSize(std::size_t size) {
  if (size > kMaxPayloadBytes) {
    throw std::invalid_argument("payload of " + std::to_string(size) + " bytes, allowed are " +
                                std::to_string(kMaxPayloadBytes) + ": split it");
  }
  return static_cast<int>(size);
}

void startFrame(EVP_CIPHER_CTX* context, const std::array<std::uint8_t, 12>& nonce) {
  requireOk(EVP_CipherInit_ex(context, nullptr, nullptr, nullptr, nonce.data(), -1), "set a nonce");
}

// One pass: `out` null takes the data as associated data only. OpenSSL reads size 0 as the end.
void pass(EVP_CIPHER_CTX* context, const void* in, int size, void* out) {
  if (size == 0) return;
  int written = 0;
  requireOk(EVP_CipherUpdate(context, static_cast<std::uint8_t*>(out), &written,
                             static_cast<const std::uint8_t*>(in), size),
            "run AES-GCM");
}

bool finish(EVP_CIPHER_CTX* context) {
  std::uint8_t unused[16];
  int written = 0;
  return EVP_CipherFinal_ex(context, unused, &written) == 1;
}

void finishSealing(EVP_CIPHER_CTX* context, std::uint8_t* tag) {
  requireOk(finish(context), "finish AES-GCM");
  requireOk(EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, kTagBytes, tag), "give a tag");
}

EVP_CIPHER_CTX* newContext(const FrameCipher::Key& key, bool is_sealing) {
  EVP_CIPHER_CTX* context = EVP_CIPHER_CTX_new();
  if (context == nullptr) throw std::bad_alloc();
  const EVP_CIPHER* gcm = EVP_aes_256_gcm();
  if (EVP_CipherInit_ex(context, gcm, nullptr, key.data(), nullptr, is_sealing) != 1) {
    EVP_CIPHER_CTX_free(context);
    throw std::runtime_error("OpenSSL offers no AES-256-GCM");
  }
  return context;
}

}  // namespace

void encodeFields(const FrameHeader& header, std::uint8_t* out) {
  storeLittle(kMagic, out);
  out[2] = kProtocolVersion;
  out[3] = static_cast<std::uint8_t>(header.type);
  out[4] = header.traffic_class;
  out[5] = header.flags;
  storeLittle<std::uint16_t>(0, out + 6);
  storeLittle(header.group, out + 8);
  storeLittle(static_cast<std::uint32_t>(header.tag), out + 12);
  storeLittle(header.seq, out + 16);
  storeLittle(header.offset, out + 24);
  storeLittle(header.total, out + 32);
  storeLittle(header.length, out + 40);
  storeLittle(header.crc, out + 44);
}

FrameHeader decodeFields(const std::uint8_t* in) {
  requireEqual("magic", loadLittle<std::uint16_t>(in), kMagic);
  requireEqual("version", in[2], kProtocolVersion);
  if (in[3] < 1 || in[3] > kLastFrameType) {
    refuseField("type", in[3], "1 to " + std::to_string(kLastFrameType));
  }
  requireAtMost("class", in[4], kNumClasses - 1);
  requireAtMost("flags", in[5], kAllFlags);
  requireEqual("zero", loadLittle<std::uint16_t>(in + 6), 0);

  FrameHeader header;
  header.type = static_cast<FrameType>(in[3]);
  header.traffic_class = in[4];
  header.flags = in[5];
  header.group = loadLittle<std::uint32_t>(in + 8);
  header.tag = static_cast<std::int32_t>(loadLittle<std::uint32_t>(in + 12));
  header.seq = loadLittle<std::uint64_t>(in + 16);
  header.offset = loadLittle<std::uint64_t>(in + 24);
  header.total = loadLittle<std::uint64_t>(in + 32);
  header.length = loadLittle<std::uint32_t>(in + 40);
  header.crc = loadLittle<std::uint32_t>(in + 44);

  requireAtMost("length", header.length, maxLength(header.type));
  if (header.type == FrameType::kData) {  // offset + length could overflow
    requireAtMost("length", header.length, header.total);
    requireAtMost("offset", header.offset, header.total - header.length);
  }
  return header;
}

void FrameCipher::Free::operator()(evp_cipher_ctx_st* context) const {
  EVP_CIPHER_CTX_free(context);
}

FrameCipher::FrameCipher(const Key& key, const Salt& salt)
    : seal_(newContext(key, true)), open_(newContext(key, false)), salt_(salt) {}
FrameCipher::~FrameCipher() = default;
FrameCipher::FrameCipher(FrameCipher&&) noexcept = default;
FrameCipher& FrameCipher::operator=(FrameCipher&&) noexcept = default;

std::array<std::uint8_t, 12> FrameCipher::nextNonce() {
  std::array<std::uint8_t, 12> nonce;
  std::memcpy(nonce.data(), salt_.data(), salt_.size());
  storeLittle(counter_++, nonce.data() + salt_.size());
  return nonce;
}

void FrameCipher::sealHeader(const std::uint8_t* fields, std::uint8_t* tag) {
  macPayload(fields, kFieldBytes, tag);
}

bool FrameCipher::openHeader(const std::uint8_t* fields, const std::uint8_t* tag) {
  return checkPayload(fields, kFieldBytes, tag);
}

void FrameCipher::macPayload(const void* data, std::size_t size, std::uint8_t* tag) {
  const int num_bytes = payloadSize(size);
  startFrame(seal_.get(), nextNonce());
  pass(seal_.get(), data, num_bytes, nullptr);
  finishSealing(seal_.get(), tag);
}

bool FrameCipher::checkPayload(const void* data, std::size_t size, const std::uint8_t* tag) {
  std::uint8_t expected[kTagBytes];
  macPayload(data, size, expected);
  return CRYPTO_memcmp(expected, tag, kTagBytes) == 0;
}

void FrameCipher::encryptPayload(const void* in, std::size_t size, void* out, std::uint8_t* tag) {
  const int num_bytes = payloadSize(size);
  startFrame(seal_.get(), nextNonce());
  pass(seal_.get(), in, num_bytes, out);
  finishSealing(seal_.get(), tag);
}

bool FrameCipher::decryptPayload(const void* in, std::size_t size, void* out,
                                 const std::uint8_t* tag) {
  const int num_bytes = payloadSize(size);
  startFrame(open_.get(), nextNonce());
  pass(open_.get(), in, num_bytes, out);
  std::array<std::uint8_t, kTagBytes> expected;  // OpenSSL wants it writable
  std::memcpy(expected.data(), tag, kTagBytes);
  requireOk(EVP_CIPHER_CTX_ctrl(open_.get(), EVP_CTRL_AEAD_SET_TAG, kTagBytes, expected.data()),
            "take a tag");
  if (finish(open_.get())) return true;
  if (size > 0) std::memset(out, 0, size);  // nobody must use what was not authentic
  return false;
}

}  // namespace dora
