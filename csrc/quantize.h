// Compressed tensors: quantises and packs memory for the wire, and back, one pass over it.
//
// dora/kernels/format.py describes the bytes, dora/kernels/reference.py defines each bit of them:
// all instruction sets give the same. Every product and sum is rounded by itself, so this must be
// compiled with -ffp-contract=off. Wires may lie anywhere, tensors as their type demands.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "reduce.h"

namespace dora::quant {

enum class Codes : std::uint8_t { kInt8, kInt4, kFp8 };

// `group` values share a scale: 32, 64, 128 or 256.
struct Layout {
  Codes codes;
  std::size_t group;
};

// Elements per tile.
constexpr std::size_t kTile = 2048;

std::size_t wireBytes(std::size_t count, Layout layout);

// Of stochastic rounding. Element i gets the random number of index `first + i`.
struct Random {
  bool is_on;
  std::uint32_t seed;
  std::uint32_t first;
};

// One bfloat16 per channel. Element i is of channel (first + i) % count; none if `count` is 0.
struct Factors {
  const std::uint16_t* values;
  std::size_t count;
  std::size_t first;
};

struct Encoding {
  const void* values;
  DataType type;  // float32, float16 or bfloat16, as all types below
  std::size_t count;
  Layout layout;
  Random random;
  Factors factors;
  float* error;  // added to the values, then set to what encoding has lost; or null
  std::uint8_t* wire;
};

struct Decoding {
  const std::uint8_t* wire;
  std::size_t count;
  Layout layout;
  Factors factors;
  const void* add;  // added to the decoded values; may be `out`; or null
  DataType add_type;
  void* out;
  DataType type;
};

// Instruction sets that this processor runs, best first; the parameter below is one of these.
std::vector<std::string> instructionSets();

// Returns false if a value is infinite or not a number; what was written then is of no use.
bool encode(const Encoding& encoding, const std::string& instruction_set);
void decode(const Decoding& decoding, const std::string& instruction_set);

// Encodes the sum of weights[k] times what wires[k] holds, added in order.
bool reduce(const std::vector<const std::uint8_t*>& wires, const std::vector<float>& weights,
            std::size_t count, Layout layout, Random random, std::uint8_t* wire,
            const std::string& instruction_set);

// The largest magnitude of each column as bfloat16; 1 for columns of zeros.
void channelFactors(const void* values, DataType type, std::size_t rows, std::size_t channels,
                    std::uint16_t* factors, const std::string& instruction_set);

}  // namespace dora::quant
