// Python's view of the compression kernels. The contract is dora/_C.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "quantize.h"

namespace py = pybind11;

namespace dora {

namespace {

using Address = std::uintptr_t;

template <typename T>
T* pointerTo(Address address) {
  return reinterpret_cast<T*>(address);
}

DataType floatTypeOf(const std::string& word) {
  const DataType type = dataTypeOf(word);
  if (type != DataType::kFloat32 && type != DataType::kFloat16 && type != DataType::kBFloat16) {
    throw std::invalid_argument("data type: given " + word +
                                ", allowed: float32, float16, bfloat16");
  }
  return type;
}

quant::Layout layoutOf(const std::string& codes, std::size_t group) {
  if (group != 32 && group != 64 && group != 128 && group != 256) {
    throw std::invalid_argument("group: given " + std::to_string(group) +
                                ", allowed: 32, 64, 128, 256");
  }
  if (codes == "int8") return {quant::Codes::kInt8, group};
  if (codes == "int4") return {quant::Codes::kInt4, group};
  if (codes == "fp8") return {quant::Codes::kFp8, group};
  throw std::invalid_argument("codes: given " + codes + ", allowed: int8, int4, fp8");
}

// Of the wire format: everything counts modulo 2^32, and channels from the same first element.
quant::Random randomOf(bool is_stochastic, std::uint64_t seed, std::uint64_t first_index) {
  return {is_stochastic, static_cast<std::uint32_t>(seed),
          static_cast<std::uint32_t>(first_index)};
}

bool quantizePack(Address values, const std::string& dtype, std::size_t count, Address wire,
                  const std::string& codes, std::size_t group, bool is_stochastic,
                  std::uint64_t seed, std::uint64_t first_index, Address error, Address factors,
                  std::size_t num_channels, const std::string& instruction_set) {
  const quant::Encoding encoding{pointerTo<const void>(values),
                                 floatTypeOf(dtype),
                                 count,
                                 layoutOf(codes, group),
                                 randomOf(is_stochastic, seed, first_index),
                                 {pointerTo<const std::uint16_t>(factors), num_channels,
                                  static_cast<std::size_t>(first_index)},
                                 pointerTo<float>(error),
                                 pointerTo<std::uint8_t>(wire)};
  py::gil_scoped_release unlocked;
  return quant::encode(encoding, instruction_set);
}

void unpackDequantize(Address wire, std::size_t count, Address out, const std::string& dtype,
                      const std::string& codes, std::size_t group, std::uint64_t first_index,
                      Address add, const std::string& add_dtype, Address factors,
                      std::size_t num_channels, const std::string& instruction_set) {
  const quant::Decoding decoding{pointerTo<const std::uint8_t>(wire),
                                 count,
                                 layoutOf(codes, group),
                                 {pointerTo<const std::uint16_t>(factors), num_channels,
                                  static_cast<std::size_t>(first_index)},
                                 pointerTo<const void>(add),
                                 floatTypeOf(add_dtype),
                                 pointerTo<void>(out),
                                 floatTypeOf(dtype)};
  py::gil_scoped_release unlocked;
  quant::decode(decoding, instruction_set);
}

bool reduceWires(const std::vector<Address>& wires, const std::vector<float>& weights,
                 std::size_t count, Address wire, const std::string& codes, std::size_t group,
                 bool is_stochastic, std::uint64_t seed, const std::string& instruction_set) {
  if (wires.size() != weights.size()) {
    throw std::invalid_argument("weights: given " + std::to_string(weights.size()) +
                                ", allowed: one per wire, " + std::to_string(wires.size()));
  }
  std::vector<const std::uint8_t*> pointers;
  for (Address address : wires) pointers.push_back(pointerTo<const std::uint8_t>(address));
  const quant::Layout layout = layoutOf(codes, group);
  py::gil_scoped_release unlocked;
  return quant::reduce(pointers, weights, count, layout, randomOf(is_stochastic, seed, 0),
                       pointerTo<std::uint8_t>(wire), instruction_set);
}

void channelFactors(Address values, const std::string& dtype, std::size_t num_rows,
                    std::size_t num_channels, Address factors,
                    const std::string& instruction_set) {
  const DataType type = floatTypeOf(dtype);
  py::gil_scoped_release unlocked;
  quant::channelFactors(pointerTo<const void>(values), type, num_rows, num_channels,
                        pointerTo<std::uint16_t>(factors), instruction_set);
}

}  // namespace

void bindQuantize(py::module_& m) {
  m.def("instruction_sets", &quant::instructionSets);
  m.def("quantize_pack", &quantizePack, py::arg("values"), py::arg("dtype"), py::arg("count"),
        py::arg("wire"), py::arg("codes"), py::arg("group"), py::arg("is_stochastic"),
        py::arg("seed"), py::arg("first_index"), py::arg("error"), py::arg("factors"),
        py::arg("num_channels"), py::arg("instruction_set"));
  m.def("unpack_dequantize", &unpackDequantize, py::arg("wire"), py::arg("count"), py::arg("out"),
        py::arg("dtype"), py::arg("codes"), py::arg("group"), py::arg("first_index"),
        py::arg("add"), py::arg("add_dtype"), py::arg("factors"), py::arg("num_channels"),
        py::arg("instruction_set"));
  m.def("reduce_wires", &reduceWires, py::arg("wires"), py::arg("weights"), py::arg("count"),
        py::arg("wire"), py::arg("codes"), py::arg("group"), py::arg("is_stochastic"),
        py::arg("seed"), py::arg("instruction_set"));
  m.def("channel_factors", &channelFactors, py::arg("values"), py::arg("dtype"),
        py::arg("num_rows"), py::arg("num_channels"), py::arg("factors"),
        py::arg("instruction_set"));
}

}  // namespace dora
