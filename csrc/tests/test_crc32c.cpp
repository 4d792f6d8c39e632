#include <algorithm>
#include <cstring>
#include <vector>

#include "../frame.h"
#include "check.h"

namespace {

using dora::crc32c;
using dora::crc32cByTable;

std::uint32_t bitwise(const std::uint8_t* data, std::size_t size, std::uint32_t crc = 0) {
  crc = ~crc;
  for (std::size_t i = 0; i < size; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82f63b78u : 0);
  }
  return ~crc;
}

std::vector<std::uint8_t> noise(std::size_t size) {
  std::vector<std::uint8_t> bytes(size);
  std::uint32_t state = 1;
  for (auto& byte : bytes) {
    state = state * 1664525u + 1013904223u;
    byte = static_cast<std::uint8_t>(state >> 24);
  }
  return bytes;
}

void checkBoth(const void* data, std::size_t size, std::uint32_t expected, std::uint32_t crc = 0) {
  CHECK(crc32c(data, size, crc) == expected);
  CHECK(crc32cByTable(data, size, crc) == expected);
}

void test_crc32c_vectors_of_rfc3720() {
  std::uint8_t bytes[32];
  std::memset(bytes, 0, sizeof(bytes));
  checkBoth(bytes, 32, 0x8a9136aa);
  std::memset(bytes, 0xff, sizeof(bytes));
  checkBoth(bytes, 32, 0x62a8ab43);
  for (std::uint8_t i = 0; i < 32; ++i) bytes[i] = i;
  checkBoth(bytes, 32, 0x46dd794e);
  for (std::uint8_t i = 0; i < 32; ++i) bytes[i] = static_cast<std::uint8_t>(31 - i);
  checkBoth(bytes, 32, 0x113fdb5c);
  checkBoth("123456789", 9, 0xe3069283);
}

void test_crc32c_nothing() {
  checkBoth(nullptr, 0, 0);
  checkBoth(nullptr, 0, 123, 123);
}

void test_crc32c_every_short_length_and_offset() {
  const auto bytes = noise(320);
  for (std::size_t offset = 0; offset <= 8; ++offset) {
    for (std::size_t size = 0; size <= 300; ++size) {
      checkBoth(bytes.data() + offset, size, bitwise(bytes.data() + offset, size));
    }
  }
}

void test_crc32c_around_block_borders() {
  const auto bytes = noise(3 * 3 * 4096 + 1024);
  for (const std::size_t border : {3 * 256, 2 * 3 * 256, 3 * 4096, 3 * 4096 + 3 * 256, 6 * 4096}) {
    for (std::size_t size = border - 9; size <= border + 9; ++size) {
      checkBoth(bytes.data() + 1, size, bitwise(bytes.data() + 1, size));
    }
  }
}

void test_crc32c_large() {
  const auto bytes = noise((1u << 20) + 13);
  checkBoth(bytes.data() + 3, bytes.size() - 3, bitwise(bytes.data() + 3, bytes.size() - 3));
}

void test_crc32c_in_pieces_equals_whole() {
  const auto bytes = noise(100003);
  const std::uint32_t whole = crc32c(bytes.data(), bytes.size());
  for (const std::size_t piece : {1, 7, 255, 769, 12288, 65536}) {
    std::uint32_t crc = 0;
    for (std::size_t at = 0; at < bytes.size(); at += piece) {
      const std::size_t size = std::min(piece, bytes.size() - at);
      crc = (at / piece) % 2 ? crc32cByTable(&bytes[at], size, crc) : crc32c(&bytes[at], size, crc);
    }
    CHECK(crc == whole);
  }
}

}  // namespace

int main() {
  test_crc32c_vectors_of_rfc3720();
  test_crc32c_nothing();
  test_crc32c_every_short_length_and_offset();
  test_crc32c_around_block_borders();
  test_crc32c_large();
  test_crc32c_in_pieces_equals_whole();
}
