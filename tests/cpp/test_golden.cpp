// The committed bytes of the format. They change only together with format::kVersion: checkpoints hold them.
#include <gtest/gtest.h>

#include <bit>
#include <fstream>
#include <iterator>
#include <string>

#include "support.h"

namespace sparse_marlin {
namespace {

std::string read_file(const std::string& name) {
  std::ifstream file(std::string(SPARSE_MARLIN_GOLDEN_DIR) + "/" + name, std::ios::binary);
  EXPECT_TRUE(file.good()) << name;
  return {std::istreambuf_iterator<char>(file), {}};
}

// The weight of tests/golden/manifest.json, by its rule.
std::vector<int8_t> rule_codes(int64_t n, int64_t k, int num_bits) {
  std::vector<unsigned> masks;
  for (unsigned mask = 0; mask < 1u << format::kQuad; ++mask) {
    if (std::popcount(mask) <= format::kKeptPerQuad) masks.push_back(mask);
  }
  std::vector<int8_t> codes(static_cast<size_t>(n * k), 0);
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t quad = 0; quad < k / format::kQuad; ++quad) {
      const int64_t x = 7919 * row + 104729 * quad + 12345;
      const unsigned mask = masks[static_cast<size_t>(x) % masks.size()];
      for (int p = 0; p < format::kQuad; ++p) {
        if ((mask >> p & 1) == 0) continue;
        const int64_t v = 1 + x * (p + 3) % ((1 << num_bits) - 1);
        const int64_t code = v > format::code_max(num_bits) ? v - (1 << num_bits) : v;
        codes[static_cast<size_t>(row * k + quad * format::kQuad + p)] = static_cast<int8_t>(code);
      }
    }
  }
  return codes;
}

TEST(Golden, ManifestIsOfThisVersion) {
  const std::string manifest = read_file("manifest.json");
  EXPECT_NE(manifest.find("\"format\": \"" + std::string(format::kName) + "\""), std::string::npos);
  EXPECT_NE(manifest.find("\"format_version\": " + std::to_string(format::kVersion) + ","), std::string::npos);
}

TEST(Golden, PackingGivesTheCommittedBytes) {
  constexpr int64_t kRows = 20, kCols = 132;
  for (int bits : {4, 8}) {
    const std::string committed = read_file("int" + std::to_string(bits) + ".bin");
    const test::Packed packed = test::pack_codes(rule_codes(kRows, kCols, bits), kRows, kCols, bits);
    std::string bytes;  // little-endian, whatever this machine is
    for (uint32_t word : packed.words) {
      for (int shift = 0; shift < format::kWordBits; shift += 8)
        bytes.push_back(static_cast<char>(word >> shift & 0xff));
    }
    ASSERT_EQ(bytes.size(), committed.size());
    const auto first = std::mismatch(bytes.begin(), bytes.end(), committed.begin()).first;
    EXPECT_EQ(first, bytes.end()) << "byte " << first - bytes.begin() << " of int" << bits << ".bin differs";
  }
}

}  // namespace
}  // namespace sparse_marlin
