#include "quantize.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "floats.h"
#include "quantize_tiles.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dora::quant {

namespace {

// 2^126: the largest factor whose inverse is not subnormal.
constexpr std::int32_t kLargestFactor = 253 << 23;

// Results of so many bytes go past the caches: these are not read first, only to be overwritten.
// A server's core, GB/s of float32 out of int8: 16 MiB decode at 9.7 instead of 6.3, and decode and
// are read at 5.5 instead of 4.1; with 2 MiB, which stay in its cache, reading takes the gain back.
constexpr std::size_t kStreamBytes = 8 << 20;

// Values on their way, in the nearest cache.
struct alignas(64) Scratch {
  float values[kTile];
};

const Tiles& tilesOf(const std::string& instruction_set) {
  std::string names;
  for (const Tiles* tiles : availableTiles()) {
    if (tiles->name == instruction_set) return *tiles;
    names += names.empty() ? tiles->name : std::string(", ") + tiles->name;
  }
  throw std::invalid_argument("instruction set: given '" + instruction_set +
                              "', allowed: " + names);
}

// `count` values from `first` on, and where they lie on the wire.
struct Piece {
  std::size_t first;
  std::size_t count;
  std::size_t num_groups;
  std::size_t num_padded;
  std::size_t scales;
  std::size_t codes;
};

Piece pieceAt(std::size_t first, std::size_t count, Layout layout) {
  const std::size_t here = std::min(kTile, count - first);
  const std::size_t num_groups = (here + layout.group - 1) / layout.group;
  const std::size_t scales = wireBytes(first, layout);
  return {first, here, num_groups, num_groups * layout.group, scales,
          scales + num_groups * kScaleBytes};
}

Random randomAt(Random random, const Piece& piece) {
  random.first += static_cast<std::uint32_t>(piece.first);
  return random;
}

const void* elementAt(const void* data, DataType type, std::size_t index) {
  return static_cast<const std::uint8_t*>(data) + index * sizeOf(type);
}

void* elementAt(void* data, DataType type, std::size_t index) {
  return static_cast<std::uint8_t*>(data) + index * sizeOf(type);
}

EncodeTile encoderOf(const Tiles& tiles, Layout layout, Random random) {
  const auto codes = static_cast<std::size_t>(layout.codes);
  return tiles.encode[codes][groupIndex(layout.group)][random.is_on];
}

DecodeTile decoderOf(const Tiles& tiles, Layout layout) {
  return tiles.decode[static_cast<std::size_t>(layout.codes)][groupIndex(layout.group)];
}

std::vector<float> floatsOf(const Factors& factors) {
  std::vector<float> values(factors.count);
  std::transform(factors.values, factors.values + factors.count, values.begin(),
                 BFloat16::decode);
  return values;
}

std::vector<float> inversesOf(const Factors& factors) {
  std::vector<float> values = floatsOf(factors);
  for (float& value : values) value = 1.0f / value;
  return values;
}

// Multiplies each value with that of its channel; `index` is that of the first.
void multiplyByChannel(const Tiles& tiles, float* values, std::size_t count,
                       const std::vector<float>& by_channel, std::size_t index) {
  std::size_t channel = index % by_channel.size();
  for (std::size_t done = 0; done < count; channel = 0) {
    const std::size_t here = std::min(count - done, by_channel.size() - channel);
    tiles.multiply(values + done, by_channel.data() + channel, here);
    done += here;
  }
}

// Whether `stream` can write there; where an instruction for it is missing, nothing is gained.
bool isStreamed(const Decoding& d) {
#if defined(__x86_64__)
  return d.type == DataType::kFloat32 && d.count * sizeof(float) >= kStreamBytes &&
         reinterpret_cast<std::uintptr_t>(d.out) % sizeof(__m128) == 0;
#else
  (void)d;
  return false;
#endif
}

// Copies a tile past the caches; both lie at multiples of 16 bytes.
void stream([[maybe_unused]] const float* from, [[maybe_unused]] float* to) {
#if defined(__x86_64__)
  for (std::size_t i = 0; i < kTile; i += 4) _mm_stream_ps(to + i, _mm_load_ps(from + i));
#endif
}

// Orders streamed results before what follows, as other results are.
void endStream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// What is to be encoded is in `given` before it is divided by the factors, and decoded again.
void updateError(const Tiles& tiles, const Encoding& e, const Piece& piece,
                 const std::vector<float>& factors, const Scratch& given) {
  Scratch lossy;
  decoderOf(tiles, e.layout)(e.wire + piece.scales, e.wire + piece.codes, piece.num_groups,
                             lossy.values);
  if (!factors.empty()) {
    multiplyByChannel(tiles, lossy.values, piece.count, factors, e.factors.first + piece.first);
  }
  tiles.subtract(given.values, lossy.values, piece.count, e.error + piece.first);
}

}  // namespace

std::size_t wireBytes(std::size_t count, Layout layout) {
  return (count + layout.group - 1) / layout.group * (kScaleBytes + codeBytes(layout));
}

std::vector<std::string> instructionSets() {
  std::vector<std::string> names;
  for (const Tiles* tiles : availableTiles()) names.emplace_back(tiles->name);
  return names;
}

bool encode(const Encoding& e, const std::string& instruction_set) {
  const Tiles& tiles = tilesOf(instruction_set);
  const EncodeTile encode_tile = encoderOf(tiles, e.layout, e.random);
  const std::vector<float> factors = floatsOf(e.factors);
  const std::vector<float> inverses = inversesOf(e.factors);
  const bool is_direct = e.type == DataType::kFloat32 && !e.error && factors.empty();
  Scratch given, scaled;
  for (std::size_t first = 0; first < e.count; first += kTile) {
    const Piece piece = pieceAt(first, e.count, e.layout);
    const void* from = elementAt(e.values, e.type, first);
    const float* values = static_cast<const float*>(from);
    if (!is_direct || piece.num_padded != piece.count) {
      tiles.load(from, e.type, piece.count, given.values);
      if (e.error) tiles.add(given.values, e.error + first, piece.count);
      std::fill(given.values + piece.count, given.values + piece.num_padded, 0.0f);
      values = given.values;
    }
    if (!factors.empty()) {
      std::copy(given.values, given.values + piece.num_padded, scaled.values);
      multiplyByChannel(tiles, scaled.values, piece.count, inverses, e.factors.first + first);
      values = scaled.values;
    }
    const std::int32_t largest =
        encode_tile(values, piece.num_groups, randomAt(e.random, piece), e.wire + piece.scales,
                    e.wire + piece.codes);
    if (largest >= kInfinity) return false;
    if (e.error) updateError(tiles, e, piece, factors, given);
  }
  return true;
}

void decode(const Decoding& d, const std::string& instruction_set) {
  const Tiles& tiles = tilesOf(instruction_set);
  const DecodeTile decode_tile = decoderOf(tiles, d.layout);
  const std::vector<float> factors = floatsOf(d.factors);
  const bool is_streamed = isStreamed(d);
  const bool is_direct =
      d.type == DataType::kFloat32 && !d.add && factors.empty() && !is_streamed;
  Scratch decoded, added;
  for (std::size_t first = 0; first < d.count; first += kTile) {
    const Piece piece = pieceAt(first, d.count, d.layout);
    void* out = elementAt(d.out, d.type, first);
    const bool is_in_place = is_direct && piece.num_padded == piece.count;
    float* values = is_in_place ? static_cast<float*>(out) : decoded.values;
    decode_tile(d.wire + piece.scales, d.wire + piece.codes, piece.num_groups, values);
    if (is_in_place) continue;
    if (!factors.empty()) {
      multiplyByChannel(tiles, values, piece.count, factors, d.factors.first + first);
    }
    if (d.add) {
      tiles.load(elementAt(d.add, d.add_type, first), d.add_type, piece.count, added.values);
      tiles.add(values, added.values, piece.count);
    }
    if (is_streamed && piece.count == kTile) {
      stream(values, static_cast<float*>(out));
    } else {
      tiles.store(values, piece.count, out, d.type);
    }
  }
  if (is_streamed) endStream();
}

bool reduce(const std::vector<const std::uint8_t*>& wires, const std::vector<float>& weights,
            std::size_t count, Layout layout, Random random, std::uint8_t* wire,
            const std::string& instruction_set) {
  const Tiles& tiles = tilesOf(instruction_set);
  Scratch sum, decoded;
  for (std::size_t first = 0; first < count; first += kTile) {
    const Piece piece = pieceAt(first, count, layout);
    // The one number that changes no other when added to it, not even the sign of a zero.
    std::fill(sum.values, sum.values + piece.num_padded, -0.0f);
    for (std::size_t k = 0; k < wires.size(); ++k) {
      decoderOf(tiles, layout)(wires[k] + piece.scales, wires[k] + piece.codes, piece.num_groups,
                               decoded.values);
      tiles.accumulate(sum.values, decoded.values, weights[k], piece.num_padded);
    }
    std::fill(sum.values + piece.count, sum.values + piece.num_padded, 0.0f);
    const std::int32_t largest = encoderOf(tiles, layout, random)(
        sum.values, piece.num_groups, randomAt(random, piece), wire + piece.scales,
        wire + piece.codes);
    if (largest >= kInfinity) return false;
  }
  return true;
}

void channelFactors(const void* values, DataType type, std::size_t rows, std::size_t channels,
                    std::uint16_t* factors, const std::string& instruction_set) {
  const Tiles& tiles = tilesOf(instruction_set);
  std::vector<std::int32_t> largest(channels, 0);
  Scratch loaded;
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t first = 0; first < channels; first += kTile) {
      const std::size_t count = std::min(kTile, channels - first);
      tiles.load(elementAt(values, type, row * channels + first), type, count, loaded.values);
      tiles.magnitudes(loaded.values, count, largest.data() + first);
    }
  }
  std::transform(largest.begin(), largest.end(), factors, [](std::int32_t bits) {
    const bool is_zero = bits < kSmallest;
    return BFloat16::encode(is_zero ? 1.0f : bitCast<float>(std::min(bits, kLargestFactor)));
  });
}

}  // namespace dora::quant
