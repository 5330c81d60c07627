// The old format "marlin-24": what import and export write, by the definition of both layouts, field by field.
#include <gtest/gtest.h>

#include "legacy/convert.h"
#include "legacy/marlin_24.h"
#include "support.h"

namespace sparse_marlin {
namespace {

using namespace format;

struct Old {
  std::vector<uint32_t> codes;
  std::vector<uint16_t> meta;
};

Old empty_old(int64_t n, int64_t k, int bits) {
  const auto steps = static_cast<size_t>(k / kStepCols);
  return {std::vector<uint32_t>(steps * static_cast<size_t>(legacy::row_words(n, bits)), 0),
          std::vector<uint16_t>(steps * static_cast<size_t>(legacy::row_meta(n)), 0)};
}

uint16_t& meta_value(Old& old, int64_t n, int64_t row, int64_t quad) {
  const int block = static_cast<int>(quad % kStepQuads) / legacy::kBlockQuads;
  const int64_t at = quad / kStepQuads * legacy::row_meta(n) +
                     row / legacy::kRunRows * legacy::row_meta(legacy::kRunRows) +
                     legacy::meta_place(static_cast<int>(row % legacy::kRunRows), block);
  return old.meta[static_cast<size_t>(at)];
}

// With the old packers' choice of kept positions: a lone value is kept with position 2, or with 3 if it stands in 2 or 3.
Old old_by_definition(const std::vector<int8_t>& codes, int64_t n, int64_t k, int bits) {
  Old old = empty_old(n, k, bits);
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t quad = 0; quad < k / kQuad; ++quad) {
      const int8_t* values = &codes[static_cast<size_t>(row * k + quad * kQuad)];
      std::vector<int> kept;
      for (int i = 0; i < kQuad; ++i) {
        if (values[i] != 0) kept.push_back(i);
      }
      if (kept.empty()) kept = {2, 3};
      if (kept.size() == 1) kept = kept[0] < 2 ? std::vector<int>{kept[0], 2} : std::vector<int>{2, 3};
      const int in_step = static_cast<int>(quad % kStepQuads), in_run = static_cast<int>(row % legacy::kRunRows);
      for (int j = 0; j < kKeptPerQuad; ++j) {
        const Location at = legacy::code_location(in_run, in_step * kKeptPerQuad + j, bits);
        const int64_t word =
            quad / kStepQuads * legacy::row_words(n, bits) + row / legacy::kRunRows * legacy::run_words(bits) + at.word;
        old.codes[static_cast<size_t>(word)] |= encode(values[kept[static_cast<size_t>(j)]], bits) << at.shift;
      }
      uint16_t& value = meta_value(old, n, row, quad);
      value =
          static_cast<uint16_t>(value | meta_nibble({kept[0], kept[1]}) << (in_step % legacy::kBlockQuads * kMetaBits));
    }
  }
  return old;
}

struct Shape {
  int64_t n;
  int64_t k;
};
const Shape kShapes[] = {{64, 32}, {64, 128}, {128, 96}, {192, 416}, {256, 1024}};

class Legacy : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Bits, Legacy, ::testing::Values(4, 8));

TEST_P(Legacy, ImportAndExportWriteTheBytesOfBothFormats) {
  const int bits = GetParam();
  for (const auto [n, k] : kShapes) {
    const auto codes = test::random_codes(n, k, bits, static_cast<uint32_t>(n + k));
    const Old old = old_by_definition(codes, n, k, bits);
    const test::Packed wanted = test::pack_codes(codes, n, k, bits);
    for (const int threads : {1, 3}) {
      std::vector<uint32_t> packed(wanted.words.size(), ~0u);
      EXPECT_TRUE(import_marlin_24_cpu({old.codes.data(), old.meta.data(), n, k, bits, packed.data()},
                                       test::threaded_for(threads))
                      .ok());
      EXPECT_EQ(packed, wanted.words) << n << "x" << k;
      Old back = empty_old(n, k, bits);
      std::fill(back.codes.begin(), back.codes.end(), ~0u);
      std::fill(back.meta.begin(), back.meta.end(), uint16_t{0xffff});
      EXPECT_TRUE(
          export_marlin_24_cpu({packed.data(), wanted.row_words(), n, k, bits, back.codes.data(), back.meta.data()},
                               test::threaded_for(threads))
              .ok());
      EXPECT_EQ(back.codes, old.codes) << n << "x" << k;
      EXPECT_EQ(back.meta, old.meta) << n << "x" << k;
    }
  }
}

TEST_P(Legacy, ImportNamesTheFirstInvalidQuad) {
  const int bits = GetParam();
  constexpr int64_t kN = 128, kK = 256;
  Old old = old_by_definition(test::random_codes(kN, kK, bits, 1), kN, kK, bits);
  std::vector<uint32_t> packed(static_cast<size_t>(row_tiles(kN) * packed_row_words(kK, bits)));
  const auto spoil = [&](int64_t row, int64_t quad) {
    meta_value(old, kN, row, quad) &= static_cast<uint16_t>(~(0xf << (quad % legacy::kBlockQuads * kMetaBits)));
  };
  spoil(90, 3);
  spoil(77, 40);
  spoil(77, 61);
  const PackStatus status =
      import_marlin_24_cpu({old.codes.data(), old.meta.data(), kN, kK, bits, packed.data()}, test::threaded_for(3));
  EXPECT_EQ(status.fault, PackFault::kMetadata);
  EXPECT_EQ(status.row, 77);
  EXPECT_EQ(status.col, 160);
}

TEST(Rekeep, KeepsEveryValueInItsPlace) {
  for (const int bits : {4, 8}) {
    for (uint32_t nibble = 0; nibble < 16; ++nibble) {
      for (int first : {0, 3, -5}) {
        for (int second : {0, 2, -1}) {
          const auto values = [&](const legacy::KeptQuad& quad) {
            std::array<int, kQuad> all{};
            const Pattern at = meta_pattern(quad.nibble);
            all[static_cast<size_t>(at.first)] = decode(quad.first, bits);
            all[static_cast<size_t>(at.second)] = decode(quad.second, bits);
            return all;
          };
          const legacy::KeptQuad quad{encode(first, bits), encode(second, bits), nibble};
          legacy::KeptQuad fresh = quad, old = quad;
          const uint32_t invalid = legacy::rekeep<legacy::Convention::kNew>(fresh, bits);
          EXPECT_EQ(invalid != 0, !valid_meta(nibble));
          EXPECT_EQ(invalid, legacy::rekeep<legacy::Convention::kOld>(old, bits));
          if (invalid != 0) continue;
          EXPECT_EQ(values(fresh), values(quad));
          EXPECT_EQ(values(old), values(quad));
        }
      }
    }
  }
}

}  // namespace
}  // namespace sparse_marlin
