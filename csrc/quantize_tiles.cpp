// The loops over one tile. They are written plainly, with counts that the compiler knows, and
// become vectors in every function that names an instruction set; on ARM, NEON needs no name.
#include "quantize_tiles.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "floats.h"

#define DORA_INLINE [[gnu::always_inline]] inline

namespace dora::quant {

namespace {

constexpr std::int32_t kMagnitude = 0x7fffffff;
// 1.5 * 2^23: added to a float of up to 2^22 in magnitude, it leaves no room for a fraction, so
// that the sum is rounded to nearest even, and its last bits are that integer.
constexpr float kRounder = 12582912.0f;
// 2^14, whose last place is the smallest subnormal of e4m3, 2^-9.
constexpr float kFp8Rounder = 16384.0f;

// Floats in a line of a cache.
constexpr std::size_t kLine = 16;

template <Codes C>
constexpr std::int32_t kLargestCode = C == Codes::kInt8 ? 127 : C == Codes::kInt4 ? 7 : 448;

// ------------------------------------------------------------ numbers

// The finaliser of MurmurHash3 (Austin Appleby, public domain).
DORA_INLINE std::uint32_t mixed(std::uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

// One of 65536 numbers from 1 up to 2: a mantissa of random bits.
DORA_INLINE float random(std::uint32_t index, std::uint32_t mixed_seed) {
  const std::uint32_t bits = mixed(index * 0x9e3779b9u + mixed_seed) >> 16;
  return bitCast<float>(0x3f800000u | (bits << 7));
}

// Of the rounded integer, only as many of the last bits as a code has count.
DORA_INLINE std::uint32_t rounded(float y) { return bitCast<std::uint32_t>(y + kRounder); }

DORA_INLINE std::int32_t roundedDown(float y) {
  const auto towards_zero = static_cast<std::int32_t>(y);
  return towards_zero - static_cast<std::int32_t>(y < static_cast<float>(towards_zero));
}

DORA_INLINE std::uint32_t toFp8(float y) {
  const auto bits = bitCast<std::uint32_t>(y);
  const std::uint32_t largest = 0x43e00000;  // 448
  const std::uint32_t magnitude = std::min(bits & kMagnitude, largest);
  const std::uint32_t normal =
      ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - ((127u - 7u) << 3);
  const std::uint32_t subnormal = bitCast<std::uint32_t>(bitCast<float>(magnitude) + kFp8Rounder) -
                                  bitCast<std::uint32_t>(kFp8Rounder);
  return ((bits >> 24) & 0x80u) | select(magnitude < (121u << 23), subnormal, normal);
}

DORA_INLINE float fromFp8(std::uint32_t code) {
  const std::uint32_t magnitude = (code & 0x7fu) << 20;
  const std::uint32_t normal = magnitude + ((127u - 7u) << 23);
  // The mantissa as a fraction on top of 2^-6, which is then taken off again; exact.
  const auto subnormal = bitCast<std::uint32_t>(bitCast<float>(magnitude + (121u << 23)) -
                                                bitCast<float>(121u << 23));
  const std::uint32_t finite = select(magnitude < (1u << 23), subnormal, normal);
  const std::uint32_t value = select((code & 0x7fu) == 0x7fu, 0x7fc00000u, finite);
  return bitCast<float>(((code & 0x80u) << 24) | value);
}

// ------------------------------------------------------------ groups

// Returns a code in the last bits, none beyond the largest one: a scale that was rounded to nearest
// is at most 1 in 512 too small, too little to round up; for random ones see `inverseOf`.
template <Codes C, bool is_stochastic>
DORA_INLINE std::uint32_t toInteger(float y, std::uint32_t index, std::uint32_t mixed_seed) {
  if constexpr (is_stochastic) {
    return static_cast<std::uint32_t>(roundedDown(y + random(index, mixed_seed)) - 1);
  } else {
    return rounded(y);
  }
}

template <Codes C, std::size_t G, bool is_stochastic>
DORA_INLINE void encodeGroup(const float* __restrict x, float inverse, std::uint32_t index,
                             std::uint32_t mixed_seed, std::uint8_t* __restrict codes) {
  if constexpr (C == Codes::kFp8) {
    for (std::size_t i = 0; i < G; ++i) codes[i] = static_cast<std::uint8_t>(toFp8(x[i] * inverse));
  } else if constexpr (C == Codes::kInt8) {
    for (std::uint32_t i = 0; i < G; ++i) {
      codes[i] = static_cast<std::uint8_t>(
          toInteger<C, is_stochastic>(x[i] * inverse, index + i, mixed_seed));
    }
  } else {
    constexpr std::uint32_t half = G / 2;
#pragma GCC unroll 1  // see decodeGroup
    for (std::uint32_t i = 0; i < half; ++i) {
      const std::uint32_t low =
          toInteger<C, is_stochastic>(x[i] * inverse, index + i, mixed_seed);
      const std::uint32_t high =
          toInteger<C, is_stochastic>(x[i + half] * inverse, index + half + i, mixed_seed);
      codes[i] = static_cast<std::uint8_t>((low & 15u) | (high << 4));
    }
  }
}

template <std::size_t G>
DORA_INLINE std::int32_t largestMagnitude(const float* __restrict x) {
  std::int32_t largest = 0;
  for (std::size_t i = 0; i < G; ++i) {
    largest = std::max(largest, bitCast<std::int32_t>(x[i]) & kMagnitude);
  }
  return largest;
}

template <std::size_t N>
DORA_INLINE std::int32_t largestOf(const std::int32_t* values) {
  std::int32_t largest = 0;
  for (std::size_t i = 0; i < N; ++i) largest = std::max(largest, values[i]);
  return largest;
}

// Rounded up for stochastic codes, else to nearest even; the reference says why.
template <Codes C, bool is_stochastic>
DORA_INLINE std::uint32_t scaleBits(std::int32_t largest) {
  const auto bits =
      bitCast<std::uint32_t>(bitCast<float>(largest) / static_cast<float>(kLargestCode<C>));
  const std::uint32_t up = is_stochastic ? 0xffffu : 0x7fffu + ((bits >> 16) & 1u);
  return select(largest < kSmallest, 0, (bits + up) & 0xffff0000u);
}

// Takes a little off for stochastic codes if the largest value would go beyond the largest code,
// from where a random number would take it to the next one. Three roundings make at most 3 units.
template <Codes C, bool is_stochastic>
DORA_INLINE float inverseOf(std::uint32_t scale, std::int32_t largest) {
  const float inverse = 1.0f / bitCast<float>(scale);
  if constexpr (!is_stochastic) return inverse;
  const bool is_beyond = bitCast<float>(largest) * inverse > static_cast<float>(kLargestCode<C>);
  return bitCast<float>(bitCast<std::uint32_t>(inverse) - select(is_beyond, 4, 0));
}

// The magnitudes first, so that the divisions of all groups are done side by side.
template <Codes C, std::size_t G, bool is_stochastic>
DORA_INLINE std::int32_t encodeTile(const float* values, std::size_t num_groups, Random random,
                                    std::uint8_t* scales, std::uint8_t* codes) {
  constexpr std::size_t bytes = C == Codes::kInt4 ? G / 2 : G;
  constexpr std::size_t max_groups = kTile / G;
  std::int32_t largest[max_groups] = {};
  for (std::size_t g = 0; g < num_groups; ++g) largest[g] = largestMagnitude<G>(values + g * G);
  std::uint16_t stored[max_groups];
  float inverses[max_groups];
  for (std::size_t g = 0; g < max_groups; ++g) {
    const std::uint32_t bits = scaleBits<C, is_stochastic>(largest[g]);
    stored[g] = static_cast<std::uint16_t>(bits >> 16);
    inverses[g] = inverseOf<C, is_stochastic>(bits, largest[g]);
  }
  std::memcpy(scales, stored, num_groups * kScaleBytes);
  const std::uint32_t mixed_seed = mixed(random.seed);
  for (std::size_t g = 0; g < num_groups; ++g) {
    // The next tile comes from memory while this one keeps the core busy (16 MiB, GB/s of float
    // on a server: int8 8.4 instead of 6.6, int4 8.7 instead of 6.5, fp8 7.3 instead of 4.7).
    // Beyond the last value a prefetch does nothing.
    for (std::size_t i = 0; i < G; i += kLine) {
      __builtin_prefetch(values + kTile + g * G + i);
    }
    if (largest[g] < kSmallest) {
      std::memset(codes + g * bytes, 0, bytes);
    } else {
      encodeGroup<C, G, is_stochastic>(values + g * G, inverses[g],
                                       static_cast<std::uint32_t>(random.first + g * G),
                                       mixed_seed, codes + g * bytes);
    }
  }
  return largestOf<max_groups>(largest);
}

template <Codes C, std::size_t G>
DORA_INLINE void decodeGroup(const std::uint8_t* __restrict codes, float scale,
                             float* __restrict values) {
  if constexpr (C == Codes::kFp8) {
    for (std::size_t i = 0; i < G; ++i) values[i] = fromFp8(codes[i]) * scale;
  } else if constexpr (C == Codes::kInt8) {
    for (std::size_t i = 0; i < G; ++i) {
      values[i] = static_cast<float>(static_cast<std::int8_t>(codes[i])) * scale;
    }
  } else {
    constexpr std::size_t half = G / 2;
// Else gcc 12 takes 16 steps apart before it looks for vectors (groups of 32, AVX2, GB/s of float:
// encodes 6.1 instead of 15.7, decodes 7.0 instead of 21.1).
#pragma GCC unroll 1
    for (std::size_t i = 0; i < half; ++i) {
      const std::uint32_t code = codes[i];
      values[i] = static_cast<float>(static_cast<std::int32_t>(code << 28) >> 28) * scale;
      values[i + half] = static_cast<float>(static_cast<std::int32_t>(code << 24) >> 28) * scale;
    }
  }
}

template <Codes C, std::size_t G>
DORA_INLINE void decodeTile(const std::uint8_t* scales, const std::uint8_t* codes,
                            std::size_t num_groups, float* values) {
  constexpr std::size_t bytes = C == Codes::kInt4 ? G / 2 : G;
  for (std::size_t g = 0; g < num_groups; ++g) {
    std::uint16_t scale;
    std::memcpy(&scale, scales + g * kScaleBytes, sizeof(scale));
    decodeGroup<C, G>(codes + g * bytes, BFloat16::decode(scale), values + g * G);
  }
}

// ------------------------------------------------------------ values

template <typename Type>
DORA_INLINE void loadAs(const void* from, std::size_t count, float* __restrict to) {
  const auto* stored = static_cast<const typename Type::Stored*>(from);
  for (std::size_t i = 0; i < count; ++i) to[i] = Type::decode(stored[i]);
}

template <typename Type>
DORA_INLINE void storeAs(const float* __restrict from, std::size_t count, void* to) {
  auto* stored = static_cast<typename Type::Stored*>(to);
  for (std::size_t i = 0; i < count; ++i) stored[i] = Type::encode(from[i]);
}

DORA_INLINE void load(const void* from, DataType type, std::size_t count, float* to) {
  if (type == DataType::kFloat16) return loadAs<Float16>(from, count, to);
  if (type == DataType::kBFloat16) return loadAs<BFloat16>(from, count, to);
  std::memcpy(to, from, count * sizeof(float));
}

DORA_INLINE void store(const float* from, std::size_t count, void* to, DataType type) {
  if (type == DataType::kFloat16) return storeAs<Float16>(from, count, to);
  if (type == DataType::kBFloat16) return storeAs<BFloat16>(from, count, to);
  std::memcpy(to, from, count * sizeof(float));
}

DORA_INLINE void add(float* __restrict into, const float* __restrict other, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) into[i] = into[i] + other[i];
}

DORA_INLINE void multiply(float* __restrict into, const float* __restrict other,
                          std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) into[i] = into[i] * other[i];
}

DORA_INLINE void subtract(const float* __restrict a, const float* __restrict b, std::size_t count,
                          float* __restrict to) {
  for (std::size_t i = 0; i < count; ++i) to[i] = a[i] - b[i];
}

DORA_INLINE void accumulate(float* __restrict sum, const float* __restrict other, float weight,
                            std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) sum[i] = sum[i] + other[i] * weight;
}

DORA_INLINE void magnitudes(const float* __restrict values, std::size_t count,
                            std::int32_t* __restrict largest) {
  for (std::size_t i = 0; i < count; ++i) {
    largest[i] = std::max(largest[i], bitCast<std::int32_t>(values[i]) & kMagnitude);
  }
}

// ------------------------------------------------------------ instruction sets

// Functions of one instruction set, into which those above are compiled.
#define DORA_INSTRUCTION_SET(NAME, TARGET)                                                        \
  struct NAME {                                                                                   \
    template <Codes C, std::size_t G, bool S>                                                     \
    TARGET static std::int32_t encode(const float* values, std::size_t num_groups, Random random, \
                                      std::uint8_t* scales, std::uint8_t* codes) {                \
      return encodeTile<C, G, S>(values, num_groups, random, scales, codes);                      \
    }                                                                                             \
    template <Codes C, std::size_t G>                                                             \
    TARGET static void decode(const std::uint8_t* scales, const std::uint8_t* codes,              \
                              std::size_t num_groups, float* values) {                            \
      decodeTile<C, G>(scales, codes, num_groups, values);                                        \
    }                                                                                             \
    TARGET static void load(const void* from, DataType type, std::size_t count, float* to) {      \
      quant::load(from, type, count, to);                                                         \
    }                                                                                             \
    TARGET static void store(const float* from, std::size_t count, void* to, DataType type) {     \
      quant::store(from, count, to, type);                                                        \
    }                                                                                             \
    TARGET static void add(float* into, const float* other, std::size_t count) {                  \
      quant::add(into, other, count);                                                             \
    }                                                                                             \
    TARGET static void multiply(float* into, const float* other, std::size_t count) {             \
      quant::multiply(into, other, count);                                                        \
    }                                                                                             \
    TARGET static void subtract(const float* a, const float* b, std::size_t count, float* to) {   \
      quant::subtract(a, b, count, to);                                                           \
    }                                                                                             \
    TARGET static void accumulate(float* sum, const float* other, float weight,                   \
                                  std::size_t count) {                                            \
      quant::accumulate(sum, other, weight, count);                                               \
    }                                                                                             \
    TARGET static void magnitudes(const float* values, std::size_t count,                         \
                                  std::int32_t* largest) {                                        \
      quant::magnitudes(values, count, largest);                                                  \
    }                                                                                             \
  }

DORA_INSTRUCTION_SET(Baseline, );
#if defined(__x86_64__)
#if defined(__clang__)  // takes no width here
#define DORA_AVX512 "avx512f,avx512bw,avx512dq,avx512vl"
#else
#define DORA_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif
DORA_INSTRUCTION_SET(Avx2, __attribute__((target("avx2"))));
DORA_INSTRUCTION_SET(Avx512, __attribute__((target(DORA_AVX512))));
#endif

template <typename Set, Codes C, std::size_t G>
void addGroup(Tiles& tiles) {
  const auto codes = static_cast<std::size_t>(C);
  tiles.encode[codes][groupIndex(G)][false] = &Set::template encode<C, G, false>;
  // e4m3 has no stochastic codes: its values are not evenly spaced.
  tiles.encode[codes][groupIndex(G)][true] = &Set::template encode<C, G, C != Codes::kFp8>;
  tiles.decode[codes][groupIndex(G)] = &Set::template decode<C, G>;
}

template <typename Set, Codes C>
void addCodes(Tiles& tiles) {
  addGroup<Set, C, 32>(tiles);
  addGroup<Set, C, 64>(tiles);
  addGroup<Set, C, 128>(tiles);
  addGroup<Set, C, 256>(tiles);
}

template <typename Set>
Tiles tilesOf(const char* name) {
  Tiles tiles{name,           &Set::load,       &Set::store,      &Set::add, &Set::multiply,
              &Set::subtract, &Set::accumulate, &Set::magnitudes, {},        {}};
  addCodes<Set, Codes::kInt8>(tiles);
  addCodes<Set, Codes::kInt4>(tiles);
  addCodes<Set, Codes::kFp8>(tiles);
  return tiles;
}

std::vector<const Tiles*> available() {
  std::vector<const Tiles*> found;
#if defined(__x86_64__)
  static const Tiles avx512 = tilesOf<Avx512>("avx512");
  static const Tiles avx2 = tilesOf<Avx2>("avx2");
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(&avx512);
  }
  if (__builtin_cpu_supports("avx2")) found.push_back(&avx2);
#endif
  static const Tiles baseline = tilesOf<Baseline>("baseline");
  found.push_back(&baseline);
  return found;
}

}  // namespace

const std::vector<const Tiles*>& availableTiles() {
  static const std::vector<const Tiles*> found = available();
  return found;
}

}  // namespace dora::quant
