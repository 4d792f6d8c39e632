// The loops of quantize.cpp over the values of one tile, once per instruction set.
#pragma once

#include "quantize.h"

namespace dora::quant {

// What encodes `num_groups` groups at `values`; `random.first` is the index of the first. Returns
// the bits of the largest magnitude, which are ordered as the magnitudes are.
using EncodeTile = std::int32_t (*)(const float* values, std::size_t num_groups, Random random,
                                    std::uint8_t* scales, std::uint8_t* codes);
using DecodeTile = void (*)(const std::uint8_t* scales, const std::uint8_t* codes,
                            std::size_t num_groups, float* values);

// All work on `count` values, at most a tile.
struct Tiles {
  const char* name;
  void (*load)(const void* from, DataType type, std::size_t count, float* to);
  void (*store)(const float* from, std::size_t count, void* to, DataType type);
  void (*add)(float* into, const float* other, std::size_t count);
  void (*multiply)(float* into, const float* other, std::size_t count);
  void (*subtract)(const float* a, const float* b, std::size_t count, float* to);
  void (*accumulate)(float* sum, const float* other, float weight, std::size_t count);
  // Raises each of `largest` to the bits of a value's magnitude.
  void (*magnitudes)(const float* values, std::size_t count, std::int32_t* largest);
  EncodeTile encode[3][4][2];  // [codes][group][is stochastic]
  DecodeTile decode[3][4];     // [codes][group]
};

// Those that this processor runs, best first.
const std::vector<const Tiles*>& availableTiles();

inline std::size_t groupIndex(std::size_t group) {
  return group == 32 ? 0 : group == 64 ? 1 : group == 128 ? 2 : 3;
}

inline std::size_t codeBytes(Layout layout) {
  return layout.codes == Codes::kInt4 ? layout.group / 2 : layout.group;
}

constexpr std::size_t kScaleBytes = 2;

// 2^-100: what is smaller counts as zero.
constexpr std::int32_t kSmallest = 27 << 23;
constexpr std::int32_t kInfinity = 0x7f800000;

}  // namespace dora::quant
