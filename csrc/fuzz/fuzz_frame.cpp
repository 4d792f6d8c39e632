// Whatever decodeFields accepts, encodeFields writes back; no made-up tag is accepted.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../frame.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

void checkFields(const std::uint8_t* fields) {
  try {
    const dora::FrameHeader header = dora::decodeFields(fields);
    std::uint8_t again[dora::kFieldBytes];
    dora::encodeFields(header, again);
    require(std::memcmp(fields, again, sizeof(again)) == 0);
    require(header.length <= dora::kMaxPayloadBytes);
    if (header.type == dora::FrameType::kData) {
      require(header.length <= header.total && header.offset <= header.total - header.length);
    }
  } catch (const dora::ProtocolError&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static dora::FrameCipher cipher({1, 2, 3}, {4});
  if (size < dora::kFieldBytes) return 0;
  checkFields(data);
  if (size < dora::kHeaderBytes) return 0;
  require(!cipher.openHeader(data, data + dora::kFieldBytes));
  const std::uint8_t* payload = data + dora::kHeaderBytes;
  const std::size_t payload_bytes = size - dora::kHeaderBytes;
  require(!cipher.checkPayload(payload, payload_bytes, data + dora::kFieldBytes));
  std::vector<std::uint8_t> plain(payload_bytes);
  require(!cipher.decryptPayload(payload, payload_bytes, plain.data(), data + dora::kFieldBytes));
  require(dora::crc32c(payload, payload_bytes) == dora::crc32cByTable(payload, payload_bytes));
  return 0;
}
