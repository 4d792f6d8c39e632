// CRC32C three ways: SSE4.2, ARMv8, tables.
//
// The instruction takes 8 bytes per cycle but has a latency of 3, so three neighbouring blocks are
// computed at once and then joined: the CRC of a block followed by n zero bytes is that CRC times
// x^(8n), and a table per byte of the register makes this four look-ups. The technique is Mark
// Adler's ("crc32c.c", 2013, https://stackoverflow.com/a/17646775).
//
// Where a processor multiplies polynomials 64 bytes at a time (VPCLMULQDQ), large data is folded
// instead: 256 bytes are moved onto the next 256, as in Gopal et al., "Fast CRC Computation for
// Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009.
//
// A register holds a polynomial over GF(2) modulo the Castagnoli polynomial, bit-reflected: bit 31
// is the coefficient of x^0.
#include <cstring>

#include "frame.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define DORA_CRC_TARGET __attribute__((target("sse4.2")))
#elif defined(__aarch64__) && defined(__linux__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#if defined(__clang__)
#define DORA_CRC_TARGET __attribute__((target("crc")))
#else
#include <arm_acle.h>
#define DORA_CRC_TARGET __attribute__((target("+crc")))
#endif
#endif

namespace dora {
namespace {

using ByteTable = std::array<std::uint32_t, 256>;
using Update = std::uint32_t (*)(std::uint32_t, const std::uint8_t*, std::size_t);

constexpr std::uint32_t kPolynomial = 0x82f63b78;
constexpr std::uint32_t kOne = 1u << 31;

constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (std::uint32_t bit = kOne; bit != 0; bit >>= 1) {
    if (a & bit) product ^= b;
    b = (b & 1) ? (b >> 1) ^ kPolynomial : b >> 1;
  }
  return product;
}

// x^(8 * num_bytes): what `num_bytes` zero bytes multiply a register with.
constexpr std::uint32_t powerOfBytes(std::size_t num_bytes) {
  std::uint32_t result = kOne;
  std::uint32_t square = kOne >> 8;
  for (; num_bytes != 0; num_bytes >>= 1) {
    if (num_bytes & 1) result = multiply(result, square);
    square = multiply(square, square);
  }
  return result;
}

// (byte << shift) * factor for every byte; the product is linear in the bits of the byte.
constexpr ByteTable products(std::uint32_t factor, int shift) {
  ByteTable table{};
  for (std::uint32_t byte = 1; byte < 256; ++byte) {
    const std::uint32_t rest = byte & (byte - 1);
    table[byte] = rest == 0 ? multiply(byte << shift, factor) : table[rest] ^ table[byte ^ rest];
  }
  return table;
}

// [i][byte]: the register `byte` after i + 1 zero bytes.
constexpr std::array<ByteTable, 8> slicingTables() {
  std::array<ByteTable, 8> tables{};
  for (std::size_t i = 0; i < 8; ++i) tables[i] = products(powerOfBytes(i + 1), 0);
  return tables;
}
constexpr std::array<ByteTable, 8> kSlices = slicingTables();

std::uint32_t updateByTable(std::uint32_t crc, const std::uint8_t* data, std::size_t size) {
  for (; size >= 8; data += 8, size -= 8) {
    const std::uint64_t word = loadLittle<std::uint64_t>(data) ^ crc;
    crc = 0;
    for (std::size_t i = 0; i < 8; ++i) crc ^= kSlices[7 - i][(word >> (8 * i)) & 0xff];
  }
  for (; size > 0; ++data, --size) crc = (crc >> 8) ^ kSlices[0][(crc ^ *data) & 0xff];
  return crc;
}

#if defined(DORA_CRC_TARGET)

DORA_CRC_TARGET inline std::uint64_t addWord(std::uint64_t crc, const std::uint8_t* data) {
  std::uint64_t word;
  std::memcpy(&word, data, sizeof(word));
#if defined(__x86_64__)
  return _mm_crc32_u64(crc, word);
#elif defined(__clang__)
  return __builtin_arm_crc32cd(static_cast<std::uint32_t>(crc), word);
#else
  return __crc32cd(static_cast<std::uint32_t>(crc), word);
#endif
}

DORA_CRC_TARGET inline std::uint32_t addByte(std::uint32_t crc, std::uint8_t byte) {
#if defined(__x86_64__)
  return _mm_crc32_u8(crc, byte);
#elif defined(__clang__)
  return __builtin_arm_crc32cb(crc, byte);
#else
  return __crc32cb(crc, byte);
#endif
}

bool hasInstruction() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("sse4.2");
#else
  return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
#endif
}

// Moves a register over `num_bytes` zero bytes.
struct ZeroShift {
  constexpr explicit ZeroShift(std::size_t num_bytes) {
    for (std::size_t i = 0; i < 4; ++i) {
      tables[i] = products(powerOfBytes(num_bytes), static_cast<int>(8 * i));
    }
  }
  std::uint32_t operator()(std::uint64_t crc) const {
    return tables[0][crc & 0xff] ^ tables[1][(crc >> 8) & 0xff] ^ tables[2][(crc >> 16) & 0xff] ^
           tables[3][(crc >> 24) & 0xff];
  }
  std::array<ByteTable, 4> tables{};
};

template <std::size_t kBlockBytes>
constexpr ZeroShift kOverBlock{kBlockBytes};

// Takes as many triples of blocks as there are.
template <std::size_t kBlockBytes>
DORA_CRC_TARGET std::uint32_t addTriples(std::uint32_t crc, const std::uint8_t*& data,
                                         std::size_t& size) {
  for (; size >= 3 * kBlockBytes; data += 3 * kBlockBytes, size -= 3 * kBlockBytes) {
    std::uint64_t first = crc, second = 0, third = 0;
    for (std::size_t i = 0; i < kBlockBytes; i += 8) {
      first = addWord(first, data + i);
      second = addWord(second, data + kBlockBytes + i);
      third = addWord(third, data + 2 * kBlockBytes + i);
    }
    const auto& shift = kOverBlock<kBlockBytes>;
    crc = shift(shift(first) ^ second) ^ static_cast<std::uint32_t>(third);
  }
  return crc;
}

DORA_CRC_TARGET std::uint32_t updateByInstruction(std::uint32_t crc, const std::uint8_t* data,
                                                  std::size_t size) {
  crc = addTriples<4096>(crc, data, size);
  crc = addTriples<256>(crc, data, size);
  std::uint64_t wide = crc;
  for (; size >= 8; data += 8, size -= 8) wide = addWord(wide, data);
  crc = static_cast<std::uint32_t>(wide);
  for (; size > 0; ++data, --size) crc = addByte(crc, *data);
  return crc;
}

#if defined(__x86_64__)

#define DORA_FOLD_TARGET __attribute__((target("avx512f,vpclmulqdq,sse4.2")))

constexpr std::size_t kFoldBytes = 256;

// x^(8 * kFoldBytes + 31) and x^(8 * kFoldBytes - 33): what the halves of 16 bytes are multiplied
// with to move kFoldBytes on. A product of reflected polynomials is one bit short.
constexpr std::uint32_t kFoldLow = multiply(powerOfBytes(kFoldBytes), kOne >> 31);
constexpr std::uint32_t kFoldHigh = multiply(powerOfBytes(kFoldBytes - 5), kOne >> 7);

DORA_FOLD_TARGET std::uint32_t updateByFolding(std::uint32_t crc, const std::uint8_t* data,
                                               std::size_t size) {
  if (size < 4 * kFoldBytes) return updateByInstruction(crc, data, size);
  const __m512i factors = _mm512_set_epi64(kFoldHigh, kFoldLow, kFoldHigh, kFoldLow, kFoldHigh,
                                           kFoldLow, kFoldHigh, kFoldLow);
  __m512i sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = _mm512_loadu_si512(data + 64 * i);
  sums[0] = _mm512_xor_si512(sums[0], _mm512_set_epi64(0, 0, 0, 0, 0, 0, 0, crc));
  for (data += kFoldBytes, size -= kFoldBytes; size >= kFoldBytes;
       data += kFoldBytes, size -= kFoldBytes) {
    for (int i = 0; i < 4; ++i) {
      const __m512i low = _mm512_clmulepi64_epi128(sums[i], factors, 0x00);
      const __m512i high = _mm512_clmulepi64_epi128(sums[i], factors, 0x11);
      const __m512i next = _mm512_loadu_si512(data + 64 * i);
      sums[i] = _mm512_xor_si512(_mm512_xor_si512(low, high), next);
    }
  }
  std::uint8_t folded[kFoldBytes];  // has the register of all that came before
  for (int i = 0; i < 4; ++i) _mm512_storeu_si512(folded + 64 * i, sums[i]);
  crc = updateByInstruction(0, folded, kFoldBytes);
  return updateByInstruction(crc, data, size);
}

bool canFold() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
}

Update fastestUpdate() {
  if (!hasInstruction()) return updateByTable;
  return canFold() ? updateByFolding : updateByInstruction;
}

#else

Update fastestUpdate() { return hasInstruction() ? updateByInstruction : updateByTable; }

#endif

#else

Update fastestUpdate() { return updateByTable; }

#endif

}  // namespace

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc) {
  static const Update update = fastestUpdate();
  return ~update(~crc, static_cast<const std::uint8_t*>(data), size);
}

std::uint32_t crc32cByTable(const void* data, std::size_t size, std::uint32_t crc) {
  return ~updateByTable(~crc, static_cast<const std::uint8_t*>(data), size);
}

}  // namespace dora
