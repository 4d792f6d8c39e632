// Reductions against a slow reference: all values of the 16-bit types, wrapping integers, NaN,
// unaligned memory.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "reduce.h"

using namespace dora;

namespace {

using Bits = std::uint16_t;

struct Format {
  DataType type;
  int mantissa_bits;
  int exponent_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int infinity() const { return ((1 << exponent_bits) - 1) << mantissa_bits; }
};

const Format kHalf{DataType::kFloat16, 10, 5};
const Format kBrain{DataType::kBFloat16, 7, 8};

bool isNan(Format format, Bits bits) { return (bits & 0x7fff) > format.infinity(); }

// By the definition of the formats, in double.
double decode(Format format, Bits bits) {
  const int exponent = (bits & 0x7fff) >> format.mantissa_bits;
  const int mantissa = bits & ((1 << format.mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (isNan(format, bits)) return std::nan("");
  if ((bits & 0x7fff) == format.infinity()) return sign * HUGE_VAL;
  const int implicit = exponent == 0 ? 0 : 1 << format.mantissa_bits;
  const int power = (exponent == 0 ? 1 : exponent) - format.bias() - format.mantissa_bits;
  return sign * std::ldexp(mantissa + implicit, power);
}

// The nearest value, the even one of two: positive bit patterns are ordered as their values, so
// they can be searched; the pattern of infinity stands for the next power of two.
Bits encode(Format format, double value) {
  if (std::isnan(value)) return static_cast<Bits>(0x7fff);
  const Bits sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  const auto at = [&](int bits) {
    if (bits < format.infinity()) return decode(format, static_cast<Bits>(bits));
    return std::ldexp(1.0, format.bias() + 1);
  };
  int low = 0, high = format.infinity();
  if (magnitude >= at(high)) return static_cast<Bits>(sign | high);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (at(middle) <= magnitude ? low : high) = middle;
  }
  const double down = magnitude - at(low), up = at(high) - magnitude;
  const bool is_up = up < down || (up == down && low % 2 == 1);
  return static_cast<Bits>(sign | (is_up ? high : low));
}

void checkEqual(Format format, Bits given, Bits wanted) {
  CHECK(isNan(format, wanted) ? isNan(format, given) : given == wanted);
}

void testEveryValueTimesOneIsItself(Format format) {
  const Bits one = encode(format, 1);
  for (int i = 0; i < 0x10000; ++i) {
    Bits value = static_cast<Bits>(i);
    reduceInto(&value, &one, 1, format.type, ReduceOp::kProduct);
    checkEqual(format, value, static_cast<Bits>(i));
    if (isNan(format, value)) CHECK((value & 0x8000) == (i & 0x8000));
  }
}

void testRandomPairsRoundToNearestEven(Format format) {
  std::mt19937 random(7);
  std::vector<Bits> a(50000), b(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    a[i] = static_cast<Bits>(random());
    // Half of the pairs of about the same size, so that sums are not just the larger operand.
    b[i] = static_cast<Bits>(i % 2 ? random() : a[i] + random() % 4096 - 2048);
  }
  std::vector<Bits> sum = a, product = a;
  reduceInto(sum.data(), b.data(), a.size(), format.type, ReduceOp::kSum);
  reduceInto(product.data(), b.data(), a.size(), format.type, ReduceOp::kProduct);
  for (std::size_t i = 0; i < a.size(); ++i) {
    const auto x = static_cast<float>(decode(format, a[i]));
    const auto y = static_cast<float>(decode(format, b[i]));
    volatile float exact = x + y;  // rounded to float32 once, never fused
    checkEqual(format, sum[i], encode(format, exact));
    exact = x * y;
    checkEqual(format, product[i], encode(format, exact));
  }
}

void testScaleRounds16BitTypes(Format format) {
  std::vector<Bits> data(0x10000);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<Bits>(i);
  scale(data.data(), data.size(), format.type, 1.0 / 3);
  for (std::size_t i = 0; i < data.size(); ++i) {
    const double value = decode(format, static_cast<Bits>(i)) * (1.0 / 3);
    checkEqual(format, data[i], encode(format, static_cast<float>(value)));
  }
}

// Odd addresses and counts that are no multiple of a vector; neighbours stay as they were.
template <typename T>
void testAllOpsOnUnalignedMemory(DataType type) {
  CHECK(sizeOf(type) == sizeof(T));
  std::mt19937 random(3);
  for (std::size_t count : {0, 1, 2, 7, 16, 33, 100}) {
    std::vector<T> a(count), b(count);
    for (auto* values : {&a, &b}) {
      for (auto& value : *values) value = static_cast<T>(static_cast<int>(random() % 200) - 100);
    }
    for (auto op : {ReduceOp::kSum, ReduceOp::kProduct, ReduceOp::kMin, ReduceOp::kMax}) {
      std::vector<std::uint8_t> into(count * sizeof(T) + 2, 0xee), other(into);
      if (count) std::memcpy(into.data() + 1, a.data(), count * sizeof(T));
      if (count) std::memcpy(other.data() + 1, b.data(), count * sizeof(T));
      reduceInto(into.data() + 1, other.data() + 1, count, type, op);
      for (std::size_t i = 0; i < count; ++i) {
        T given;
        std::memcpy(&given, into.data() + 1 + i * sizeof(T), sizeof(T));
        const T x = a[i], y = b[i];
        const T sum = static_cast<T>(x + y), product = static_cast<T>(x * y);
        CHECK(given == (op == ReduceOp::kSum       ? sum
                        : op == ReduceOp::kProduct ? product
                        : op == ReduceOp::kMin     ? std::min(x, y)
                                                   : std::max(x, y)));
      }
      CHECK(into.front() == 0xee && into.back() == 0xee);
    }
  }
}

template <typename T>
void testIntegersWrap(DataType type) {
  using Limits = std::numeric_limits<T>;
  T value = Limits::max();
  const T one = 1, largest = Limits::max();
  reduceInto(&value, &one, 1, type, ReduceOp::kSum);
  CHECK(value == Limits::min());
  value = largest;
  reduceInto(&value, &largest, 1, type, ReduceOp::kProduct);
  CHECK(value == 1);  // (2^n - 1)^2 = 1 modulo 2^n, with n bits or with n + 1
}

template <typename T>
void testMinMaxKeepNan(DataType type) {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  for (auto op : {ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kSum, ReduceOp::kProduct}) {
    T values[2] = {nan, 1};
    const T others[2] = {1, nan};
    reduceInto(values, others, 2, type, op);
    CHECK(std::isnan(values[0]) && std::isnan(values[1]));
  }
}

void testScaleRoundsAndSaturatesIntegers() {
  std::int8_t small[] = {10, -10, 3, 5, 127, -128};
  scale(small, 6, DataType::kInt8, 0.5);
  const std::int8_t halves[] = {5, -5, 2, 2, 64, -64};  // ties to even
  CHECK(std::memcmp(small, halves, sizeof(small)) == 0);
  std::uint8_t bytes[] = {200, 3};
  scale(bytes, 2, DataType::kUInt8, 2);
  CHECK(bytes[0] == 255 && bytes[1] == 6);
  using Limits = std::numeric_limits<std::int64_t>;
  std::int64_t wide[] = {Limits::max() - 1, Limits::min() + 1};
  scale(wide, 2, DataType::kInt64, 1);
  CHECK(wide[0] == Limits::max() - 1 && wide[1] == Limits::min() + 1);
  scale(wide, 2, DataType::kInt64, 3);
  CHECK(wide[0] == Limits::max() && wide[1] == Limits::min());
}

void testScaleRoundsFloatsOnce() {
  float single = 3;
  scale(&single, 1, DataType::kFloat32, 0.1);
  CHECK(single == static_cast<float>(3 * 0.1));
  double wide = 3;
  scale(&wide, 1, DataType::kFloat64, 0.1);
  CHECK(wide == 3 * 0.1);
}

void testUnknownValuesThrow() {
  float value = 1, other = 2;
  CHECK_THROWS(sizeOf(static_cast<DataType>(9)), std::invalid_argument);
  CHECK_THROWS(
      (reduceInto(&value, &other, 1, DataType::kFloat32, static_cast<ReduceOp>(4)), 0),
      std::invalid_argument);
}

}  // namespace

int main() {
  for (const Format format : {kHalf, kBrain}) {
    CHECK(sizeOf(format.type) == 2);
    testEveryValueTimesOneIsItself(format);
    testRandomPairsRoundToNearestEven(format);
    testScaleRounds16BitTypes(format);
  }
  testAllOpsOnUnalignedMemory<float>(DataType::kFloat32);
  testAllOpsOnUnalignedMemory<double>(DataType::kFloat64);
  testAllOpsOnUnalignedMemory<std::int8_t>(DataType::kInt8);
  testAllOpsOnUnalignedMemory<std::uint8_t>(DataType::kUInt8);
  testAllOpsOnUnalignedMemory<std::int16_t>(DataType::kInt16);
  testAllOpsOnUnalignedMemory<std::int32_t>(DataType::kInt32);
  testAllOpsOnUnalignedMemory<std::int64_t>(DataType::kInt64);
  testIntegersWrap<std::int8_t>(DataType::kInt8);
  testIntegersWrap<std::uint8_t>(DataType::kUInt8);
  testIntegersWrap<std::int16_t>(DataType::kInt16);
  testIntegersWrap<std::int32_t>(DataType::kInt32);
  testIntegersWrap<std::int64_t>(DataType::kInt64);
  testMinMaxKeepNan<float>(DataType::kFloat32);
  testMinMaxKeepNan<double>(DataType::kFloat64);
  testScaleRoundsAndSaturatesIntegers();
  testScaleRoundsFloatsOnce();
  testUnknownValuesThrow();
  return 0;
}
