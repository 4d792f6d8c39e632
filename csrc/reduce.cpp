#include "reduce.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "floats.h"

namespace dora {

namespace {

// How an element lies in memory, and in what it is computed.
template <typename T>
struct Plain {
  using Stored = T;
  using Computed = T;
  static T decode(T stored) { return stored; }
  static T encode(T computed) { return computed; }
};

// Unsigned and not promoted to int: wraps where the signed type would overflow.
template <typename T>
using Wrapping = std::conditional_t<sizeof(T) == 8, std::uint64_t, std::uint32_t>;

struct Sum {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(static_cast<Wrapping<T>>(a) + static_cast<Wrapping<T>>(b));
    } else {
      return a + b;
    }
  }
};

struct Product {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(static_cast<Wrapping<T>>(a) * static_cast<Wrapping<T>>(b));
    } else {
      return a * b;
    }
  }
};

// NaN if either is NaN, as torch.minimum: `a` by its own test, `b` because it compares false.
struct Min {
  template <typename T>
  T operator()(T a, T b) const {
    return a < b || a != a ? a : b;
  }
};

struct Max {
  template <typename T>
  T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};

template <typename Visit>
auto withElement(DataType type, Visit visit) {
  switch (type) {
    case DataType::kFloat32: return visit(Plain<float>{});
    case DataType::kFloat64: return visit(Plain<double>{});
    case DataType::kFloat16: return visit(Float16{});
    case DataType::kBFloat16: return visit(BFloat16{});
    case DataType::kInt8: return visit(Plain<std::int8_t>{});
    case DataType::kUInt8: return visit(Plain<std::uint8_t>{});
    case DataType::kInt16: return visit(Plain<std::int16_t>{});
    case DataType::kInt32: return visit(Plain<std::int32_t>{});
    case DataType::kInt64: return visit(Plain<std::int64_t>{});
  }
  throw std::invalid_argument("data type: given " + std::to_string(static_cast<int>(type)) +
                              ", allowed 0 to 8");
}

template <typename Visit>
void withOperator(ReduceOp op, Visit visit) {
  switch (op) {
    case ReduceOp::kSum: return visit(Sum{});
    case ReduceOp::kProduct: return visit(Product{});
    case ReduceOp::kMin: return visit(Min{});
    case ReduceOp::kMax: return visit(Max{});
  }
  throw std::invalid_argument("reduce op: given " + std::to_string(static_cast<int>(op)) +
                              ", allowed 0 to 3");
}

// memcpy of one element is an unaligned load or store, and vectorises.
template <typename Element, typename Operator>
void reduceElements(std::uint8_t* __restrict into, const std::uint8_t* __restrict other,
                    std::size_t count, Operator combine) {
  using Stored = typename Element::Stored;
  for (std::size_t i = 0; i < count; ++i) {
    Stored a, b;
    std::memcpy(&a, into + i * sizeof(Stored), sizeof(Stored));
    std::memcpy(&b, other + i * sizeof(Stored), sizeof(Stored));
    a = Element::encode(combine(Element::decode(a), Element::decode(b)));
    std::memcpy(into + i * sizeof(Stored), &a, sizeof(Stored));
  }
}

// To nearest even; saturates where an integer type ends, NaN becomes its lowest value.
template <typename T>
T rounded(double value) {
  if constexpr (std::is_integral_v<T>) {
    // 2^63 - 1 is no double: its conversion gives 2^63, which is already too large.
    if (value >= static_cast<double>(std::numeric_limits<T>::max())) {
      return std::numeric_limits<T>::max();
    }
    if (!(value > static_cast<double>(std::numeric_limits<T>::min()))) {
      return std::numeric_limits<T>::min();
    }
    return static_cast<T>(std::nearbyint(value));
  } else {
    return static_cast<T>(value);
  }
}

template <typename Element>
void scaleElements(std::uint8_t* data, std::size_t count, double factor) {
  using Stored = typename Element::Stored;
  using Computed = typename Element::Computed;
  for (std::size_t i = 0; i < count; ++i) {
    Stored a;
    std::memcpy(&a, data + i * sizeof(Stored), sizeof(Stored));
    const double scaled = static_cast<double>(Element::decode(a)) * factor;
    a = Element::encode(rounded<Computed>(scaled));
    std::memcpy(data + i * sizeof(Stored), &a, sizeof(Stored));
  }
}

}  // namespace

std::size_t sizeOf(DataType type) {
  return withElement(type,
                     [](auto element) { return sizeof(typename decltype(element)::Stored); });
}

void reduceInto(void* into, const void* other, std::size_t count, DataType type, ReduceOp op) {
  withElement(type, [&](auto element) {
    withOperator(op, [&](auto combine) {
      reduceElements<decltype(element)>(static_cast<std::uint8_t*>(into),
                                        static_cast<const std::uint8_t*>(other), count, combine);
    });
  });
}

void scale(void* data, std::size_t count, DataType type, double factor) {
  if (factor == 1) return;  // exact for int64 beyond 2^53, too
  withElement(type, [&](auto element) {
    scaleElements<decltype(element)>(static_cast<std::uint8_t*>(data), count, factor);
  });
}

}  // namespace dora
