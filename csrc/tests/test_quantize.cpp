// The compression kernels against golden vectors, bit for bit, in every instruction set that there
// is here. tests/test_quantize.py makes the file and checks the other implementations with it.
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "quantize.h"

using namespace dora;
using namespace dora::quant;

namespace {

const char* const kGolden = "../tests/golden/quantize.txt";

template <typename T>
std::vector<T> parsed(const std::string& hex) {
  std::vector<T> values(hex == "-" ? 0 : hex.size() / 2 / sizeof(T));
  auto* bytes = reinterpret_cast<std::uint8_t*>(values.data());
  for (std::size_t i = 0; i < values.size() * sizeof(T); ++i) {
    bytes[i] = static_cast<std::uint8_t>(std::stoi(hex.substr(2 * i, 2), nullptr, 16));
  }
  return values;
}

template <typename T>
bool isSame(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

struct Case {
  Layout layout;
  Random random;
  DataType type;
  std::vector<std::uint8_t> values, wire, decoded;
  std::vector<float> error, error_after;
  std::vector<std::uint16_t> factors;
};

Case caseOf(const std::string& line) {
  std::istringstream words(line);
  std::string codes, type, values, error, factors, wire, decoded, error_after;
  Case c{};
  words >> codes >> c.layout.group >> c.random.is_on >> c.random.seed >> c.random.first >> type >>
      values >> error >> factors >> wire >> decoded >> error_after;
  CHECK(!words.fail());
  c.layout.codes = codes == "int8" ? Codes::kInt8 : codes == "int4" ? Codes::kInt4 : Codes::kFp8;
  c.type = type == "float32"   ? DataType::kFloat32
           : type == "float16" ? DataType::kFloat16
                               : DataType::kBFloat16;
  c.values = parsed<std::uint8_t>(values);
  c.error = parsed<float>(error);
  c.factors = parsed<std::uint16_t>(factors);
  c.wire = parsed<std::uint8_t>(wire);
  c.decoded = parsed<std::uint8_t>(decoded);
  c.error_after = parsed<float>(error_after);
  return c;
}

std::vector<Case> goldenCases() {
  std::ifstream file(kGolden);
  std::vector<Case> cases;
  for (std::string line; std::getline(file, line);) {
    if (!line.empty() && line[0] != '#') cases.push_back(caseOf(line));
  }
  CHECK(!cases.empty());
  return cases;
}

void check(const Case& c, const std::string& instruction_set) {
  const std::size_t count = c.values.size() / sizeOf(c.type);
  const Factors factors{c.factors.data(), c.factors.size(), c.random.first};
  std::vector<float> error = c.error;
  std::vector<std::uint8_t> wire(wireBytes(count, c.layout), 0xee);
  CHECK(encode({c.values.data(), c.type, count, c.layout, c.random, factors,
                error.empty() ? nullptr : error.data(), wire.data()},
               instruction_set));
  CHECK(isSame(wire, c.wire));
  CHECK(isSame(error, c.error_after));
  std::vector<std::uint8_t> decoded(c.values.size(), 0xee);
  decode({wire.data(), count, c.layout, factors, nullptr, c.type, decoded.data(), c.type},
         instruction_set);
  CHECK(isSame(decoded, c.decoded));
}

void test_quantize_equals_golden_vectors() {
  for (const Case& c : goldenCases()) {
    for (const std::string& instruction_set : instructionSets()) check(c, instruction_set);
  }
}

// A sum of one wire with weight 1 is that wire, if its values are what the wire can hold.
void test_quantize_sum_of_one_wire_decodes_to_the_same() {
  for (const Case& c : goldenCases()) {
    if (!c.factors.empty()) continue;
    const std::size_t count = c.values.size() / sizeOf(c.type);
    std::vector<std::uint8_t> sum(c.wire.size(), 0xee);
    const std::string best = instructionSets().front();
    CHECK(reduce({c.wire.data()}, {0.5f}, count, c.layout, c.random, sum.data(), best));
    for (const std::string& other : instructionSets()) {
      std::vector<std::uint8_t> again(c.wire.size());
      CHECK(reduce({c.wire.data()}, {0.5f}, count, c.layout, c.random, again.data(), other));
      CHECK(isSame(sum, again));
    }
  }
}

void test_quantize_wire_may_lie_anywhere() {
  const Case c = goldenCases().front();
  const std::size_t count = c.values.size() / sizeOf(c.type);
  for (std::size_t shift = 0; shift < 4; ++shift) {
    std::vector<std::uint8_t> wire(c.wire.size() + shift);
    CHECK(encode({c.values.data(), c.type, count, c.layout, c.random, {}, nullptr,
                  wire.data() + shift},
                 instructionSets().front()));
    CHECK(std::memcmp(wire.data() + shift, c.wire.data(), c.wire.size()) == 0);
  }
}

void test_quantize_unknown_instruction_set() {
  CHECK_THROWS(decode({}, "mmx"), std::invalid_argument);
}

}  // namespace

int main() {
  test_quantize_equals_golden_vectors();
  test_quantize_sum_of_one_wire_decodes_to_the_same();
  test_quantize_wire_may_lie_anywhere();
  test_quantize_unknown_instruction_set();
}
