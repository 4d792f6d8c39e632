#include <cstring>
#include <limits>
#include <vector>

#include "../frame.h"
#include "check.h"

namespace {

using namespace dora;
using Fields = std::array<std::uint8_t, kFieldBytes>;

FrameHeader dataHeader() {
  FrameHeader header;
  header.type = FrameType::kData;
  header.traffic_class = 4;
  header.flags = kFlagEager | kFlagAckMe;
  header.group = 0x01020304;
  header.tag = -2;
  header.seq = 0x1112131415161718;
  header.offset = 0x100;
  header.total = 0x2122232425262728;
  header.length = 0x10000;
  header.crc = 0xa1a2a3a4;
  return header;
}

Fields encoded(const FrameHeader& header) {
  Fields bytes;
  encodeFields(header, bytes.data());
  return bytes;
}

FrameHeader passed(const FrameHeader& header) { return decodeFields(encoded(header).data()); }

FrameCipher cipher(std::uint8_t key_byte = 7) {
  FrameCipher::Key key;
  key.fill(key_byte);
  return FrameCipher(key, {1, 2, 3, 4});
}

void test_fields_golden_bytes() {
  const Fields golden = {0x44, 0x4f, 1,    1,    4,    3,    0,    0,     // magic .. zero
                         4,    3,    2,    1,    0xfe, 0xff, 0xff, 0xff,  // group, tag
                         0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11,  // seq
                         0,    1,    0,    0,    0,    0,    0,    0,     // offset
                         0x28, 0x27, 0x26, 0x25, 0x24, 0x23, 0x22, 0x21,  // total
                         0,    0,    1,    0,    0xa4, 0xa3, 0xa2, 0xa1};  // length, crc
  CHECK(encoded(dataHeader()) == golden);
}

void test_fields_round_trip_every_type() {
  for (std::uint8_t type = 1; type <= kLastFrameType; ++type) {
    FrameHeader header = dataHeader();
    header.type = static_cast<FrameType>(type);
    header.length = 0;
    const FrameHeader back = passed(header);
    CHECK(back.type == header.type && back.traffic_class == 4 && back.flags == 3);
    CHECK(back.group == header.group && back.tag == -2 && back.seq == header.seq);
    CHECK(back.offset == header.offset && back.total == header.total);
    CHECK(back.length == 0 && back.crc == header.crc);
  }
}

void test_fields_at_any_alignment() {
  std::vector<std::uint8_t> bytes(kFieldBytes + 8);
  for (std::size_t offset = 0; offset < 8; ++offset) {
    encodeFields(dataHeader(), bytes.data() + offset);
    CHECK(decodeFields(bytes.data() + offset).seq == dataHeader().seq);
  }
}

void test_fields_wrong_byte_is_refused() {
  struct Change {
    std::size_t at;
    std::uint8_t value;
  };
  const Change changes[] = {{0, 0},  {1, 0},    {2, 0}, {2, 2},   {3, 0}, {3, 14}, {3, 255}, {4, 5},
                            {4, 255}, {5, 8}, {5, 255}, {6, 1}, {7, 1}};
  for (const Change& change : changes) {
    Fields bytes = encoded(dataHeader());
    bytes[change.at] = change.value;
    CHECK_THROWS(decodeFields(bytes.data()), ProtocolError);
  }
}

void test_fields_error_names_field_given_and_allowed() {
  Fields bytes = encoded(dataHeader());
  bytes[4] = 9;
  try {
    decodeFields(bytes.data());
    CHECK(false);
  } catch (const ProtocolError& error) {
    CHECK(std::string(error.what()) == "frame field class: given 9, allowed 0 to 4");
  }
}

void test_fields_data_beyond_its_total_is_refused() {
  FrameHeader header = dataHeader();
  header.offset = 100;
  header.length = 50;
  header.total = 150;
  CHECK(passed(header).length == 50);
  header.total = 149;
  CHECK_THROWS(passed(header), ProtocolError);
  header.total = 49;
  CHECK_THROWS(passed(header), ProtocolError);
  header.total = std::numeric_limits<std::uint64_t>::max();
  header.offset = header.total - 50;
  CHECK(passed(header).offset == header.offset);
  ++header.offset;  // the sum overflows to 0
  CHECK_THROWS(passed(header), ProtocolError);
}

void test_fields_payload_limits() {
  FrameHeader header = dataHeader();
  header.length = kMaxPayloadBytes;
  CHECK(passed(header).length == kMaxPayloadBytes);
  header.length = kMaxPayloadBytes + 1;
  CHECK_THROWS(passed(header), ProtocolError);
  header.type = FrameType::kCancel;
  header.length = 512;
  CHECK(passed(header).length == 512);
  header.length = 513;
  CHECK_THROWS(passed(header), ProtocolError);
  header.length = 1;
  for (std::uint8_t type = 1; type <= kLastFrameType; ++type) {
    header.type = static_cast<FrameType>(type);
    if (header.type == FrameType::kData || header.type == FrameType::kCancel) continue;
    CHECK_THROWS(passed(header), ProtocolError);
  }
}

void test_cipher_tag_equals_reference() {
  // From pycryptodome: AES-256-GCM, key 32 times 7, nonce 01020304 and a counter of 0,
  // then 1; associated data 48 bytes 0..47; then plain text "payload".
  const std::uint8_t header_tag[] = {0xc2, 0x8f, 0x5c, 0x7d, 0x30, 0xa6, 0x07, 0x3f,
                                     0xa4, 0x2b, 0x96, 0x47, 0x01, 0x4d, 0x9c, 0x2b};
  const std::uint8_t cipher_text[] = {0xf9, 0x2e, 0x0c, 0x3a, 0xe0, 0x95, 0x93};
  const std::uint8_t payload_tag[] = {0xfe, 0x50, 0x32, 0x49, 0x97, 0xfe, 0x0d, 0xc1,
                                     0x5e, 0x2f, 0xfc, 0xaf, 0x18, 0x40, 0x13, 0x23};
  Fields fields;
  for (std::size_t i = 0; i < fields.size(); ++i) fields[i] = static_cast<std::uint8_t>(i);
  FrameCipher sending = cipher();
  std::uint8_t tag[kTagBytes];
  sending.sealHeader(fields.data(), tag);
  CHECK(std::memcmp(tag, header_tag, kTagBytes) == 0);
  std::uint8_t out[7];
  sending.encryptPayload("payload", 7, out, tag);
  CHECK(std::memcmp(out, cipher_text, 7) == 0);
  CHECK(std::memcmp(tag, payload_tag, kTagBytes) == 0);
}

void test_cipher_every_flipped_bit_of_a_header_is_refused() {
  const Fields fields = encoded(dataHeader());
  std::array<std::uint8_t, kHeaderBytes> sealed;
  for (std::size_t bit = 0; bit <= kHeaderBytes * 8; ++bit) {
    FrameCipher sending = cipher();
    FrameCipher receiving = cipher();
    std::memcpy(sealed.data(), fields.data(), kFieldBytes);
    sending.sealHeader(sealed.data(), sealed.data() + kFieldBytes);
    const bool is_flipped = bit < kHeaderBytes * 8;
    if (is_flipped) sealed[bit / 8] ^= static_cast<std::uint8_t>(1 << (bit % 8));
    CHECK(receiving.openHeader(sealed.data(), sealed.data() + kFieldBytes) != is_flipped);
  }
}

void test_cipher_replay_reorder_and_other_key_are_refused() {
  const Fields fields = encoded(dataHeader());
  std::uint8_t first[kTagBytes], second[kTagBytes];
  FrameCipher sending = cipher();
  sending.sealHeader(fields.data(), first);
  sending.sealHeader(fields.data(), second);
  CHECK(std::memcmp(first, second, kTagBytes) != 0);

  FrameCipher replayed = cipher();
  CHECK(replayed.openHeader(fields.data(), first));
  CHECK(!replayed.openHeader(fields.data(), first));
  FrameCipher reordered = cipher();
  CHECK(!reordered.openHeader(fields.data(), second));
  FrameCipher other = cipher(8);
  CHECK(!other.openHeader(fields.data(), first));
}

void test_cipher_payloads_of_all_sizes() {
  FrameCipher sending = cipher();
  FrameCipher receiving = cipher();
  std::uint8_t tag[kTagBytes];
  for (const std::size_t size : {0u, 1u, 15u, 16u, 17u, 1000u, kMaxPayloadBytes}) {
    const std::vector<std::uint8_t> plain(size, 0x5a);
    sending.macPayload(plain.data(), size, tag);
    CHECK(receiving.checkPayload(plain.data(), size, tag));
    std::vector<std::uint8_t> wire(size);
    sending.encryptPayload(plain.data(), size, wire.data(), tag);
    CHECK(size < 16 || wire != plain);
    CHECK(receiving.decryptPayload(wire.data(), size, wire.data(), tag));  // in place
    CHECK(wire == plain);
  }
  std::uint8_t byte = 0;
  CHECK_THROWS(sending.macPayload(&byte, kMaxPayloadBytes + 1, tag), std::invalid_argument);
}

void test_cipher_altered_payload_leaves_nothing_to_read() {
  std::uint8_t tag[kTagBytes];
  std::vector<std::uint8_t> bytes(100, 0x5a);
  FrameCipher sending = cipher();
  FrameCipher receiving = cipher();
  sending.macPayload(bytes.data(), bytes.size(), tag);
  bytes[50] ^= 1;
  CHECK(!receiving.checkPayload(bytes.data(), bytes.size(), tag));
  sending.encryptPayload(bytes.data(), bytes.size(), bytes.data(), tag);
  bytes[50] ^= 1;
  CHECK(!receiving.decryptPayload(bytes.data(), bytes.size(), bytes.data(), tag));
  CHECK(bytes == std::vector<std::uint8_t>(100, 0));
}

void test_cipher_moves_with_its_counter() {
  const Fields fields = encoded(dataHeader());
  std::uint8_t tag[kTagBytes];
  FrameCipher first = cipher();
  FrameCipher receiving = cipher();
  first.sealHeader(fields.data(), tag);
  CHECK(receiving.openHeader(fields.data(), tag));
  FrameCipher second = std::move(first);
  second.sealHeader(fields.data(), tag);
  CHECK(receiving.openHeader(fields.data(), tag));
}

}  // namespace

int main() {
  test_fields_golden_bytes();
  test_fields_round_trip_every_type();
  test_fields_at_any_alignment();
  test_fields_wrong_byte_is_refused();
  test_fields_error_names_field_given_and_allowed();
  test_fields_data_beyond_its_total_is_refused();
  test_fields_payload_limits();
  test_cipher_tag_equals_reference();
  test_cipher_every_flipped_bit_of_a_header_is_refused();
  test_cipher_replay_reorder_and_other_key_are_refused();
  test_cipher_payloads_of_all_sizes();
  test_cipher_altered_payload_leaves_nothing_to_read();
  test_cipher_moves_with_its_counter();
}
