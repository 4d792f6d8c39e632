// Element-wise reductions of raw memory, with a fixed order of operands.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dora {

enum class DataType : std::uint8_t {
  kFloat32, kFloat64, kFloat16, kBFloat16, kInt8, kUInt8, kInt16, kInt32, kInt64,
};
enum class ReduceOp : std::uint8_t { kSum, kProduct, kMin, kMax };

std::size_t sizeOf(DataType type);

// into[i] = op(into[i], other[i]). float16 and bfloat16 are computed in float32 and rounded to
// nearest even. Safe on unaligned memory; the ranges must not overlap.
void reduceInto(void* into, const void* other, std::size_t count, DataType type, ReduceOp op);

// data[i] = data[i] * factor, rounded to nearest for integers. Used to weigh a rank's share.
void scale(void* data, std::size_t count, DataType type, double factor);

}  // namespace dora
