// The packed format's bijections, exhaustively: every bit of a slice has exactly one meaning.
#include <gtest/gtest.h>

#include <set>
#include <vector>

#include "format/packed_24.h"
#include "pack/pack_core.h"

namespace sparse_marlin {
namespace {

using namespace format;

class FormatBits : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Bits, FormatBits, ::testing::Values(4, 8));

TEST_P(FormatBits, EveryBitOfASliceBelongsToOneField) {
  const int bits = GetParam();
  std::vector<uint32_t> owned(static_cast<size_t>(slice_words(bits)), 0);
  const auto claim = [&](Location at, int width) {
    ASSERT_GE(at.word, 0);
    ASSERT_LT(at.word, slice_words(bits));
    ASSERT_EQ(at.shift % width, 0);
    ASSERT_LE(at.shift + width, kWordBits);
    const uint32_t mask = ((1u << width) - 1) << at.shift;
    ASSERT_EQ(owned[static_cast<size_t>(at.word)] & mask, 0u) << "word " << at.word << " shift " << at.shift;
    owned[static_cast<size_t>(at.word)] |= mask;
  };
  for (int row = 0; row < kSliceRows; ++row) {
    for (int kept = 0; kept < kSliceQuads * kKeptPerQuad; ++kept) {
      const Location at = code_location(row, kept, bits);
      ASSERT_LT(at.word, slice_code_words(bits));
      claim(at, bits);
    }
    for (int quad = 0; quad < kSliceQuads; ++quad) {
      const Location at = meta_location(row, quad, bits);
      ASSERT_GE(at.word, slice_code_words(bits));
      claim(at, kMetaBits);
    }
  }
  for (uint32_t word : owned) EXPECT_EQ(word, ~0u);
}

TEST_P(FormatBits, CoordinatesInvertLocations) {
  const int bits = GetParam();
  for (int row = 0; row < kSliceRows; ++row) {
    for (int kept = 0; kept < kSliceQuads * kKeptPerQuad; ++kept) {
      const Location at = code_location(row, kept, bits);
      const KeptCoord back = code_coord(at.word, at.shift, bits);
      EXPECT_EQ(back.row, row);
      EXPECT_EQ(back.kept, kept);
    }
    for (int quad = 0; quad < kSliceQuads; ++quad) {
      const Location at = meta_location(row, quad, bits);
      const QuadCoord back = meta_coord(at.word, at.shift, bits);
      EXPECT_EQ(back.row, row);
      EXPECT_EQ(back.quad, quad);
    }
  }
  for (int word = 0; word < slice_code_words(bits); ++word) {
    for (int shift = 0; shift < kWordBits; shift += bits) {
      const KeptCoord coord = code_coord(word, shift, bits);
      const Location back = code_location(coord.row, coord.kept, bits);
      EXPECT_EQ(back.word, word);
      EXPECT_EQ(back.shift, shift);
    }
  }
  for (int word = slice_code_words(bits); word < slice_words(bits); ++word) {
    for (int shift = 0; shift < kWordBits; shift += kMetaBits) {
      const QuadCoord coord = meta_coord(word, shift, bits);
      const Location back = meta_location(coord.row, coord.quad, bits);
      EXPECT_EQ(back.word, word);
      EXPECT_EQ(back.shift, shift);
    }
  }
}

TEST_P(FormatBits, SlicesTileTheTensorWithoutGapOrOverlap) {
  const int bits = GetParam();
  constexpr int64_t kRows = 3 * kTileRows, kCols = 5 * kTileCols;
  std::set<int64_t> starts;
  for (int64_t n = 0; n < kRows; n += kSliceRows) {
    for (int64_t k = 0; k < kCols; k += kSliceCols) {
      const int64_t start = n / kTileRows * packed_row_words(kCols, bits) + slice_offset_words(n, k, bits);
      EXPECT_EQ(start % slice_words(bits), 0);
      EXPECT_LE(start + slice_words(bits), row_tiles(kRows) * packed_row_words(kCols, bits));
      EXPECT_TRUE(starts.insert(start).second);
      for (int64_t inside : {n + kSliceRows - 1, n + 1}) {
        EXPECT_EQ(slice_offset_words(inside, k + kSliceCols - 1, bits), slice_offset_words(n, k, bits));
      }
    }
  }
  EXPECT_EQ(static_cast<int64_t>(starts.size()) * slice_words(bits), row_tiles(kRows) * packed_row_words(kCols, bits));
}

TEST_P(FormatBits, CodesAreBiased) {
  const int bits = GetParam();
  EXPECT_EQ(encode(code_min(bits), bits), 0u);
  EXPECT_EQ(encode(code_max(bits), bits), (1u << bits) - 1);
  for (int code = code_min(bits); code <= code_max(bits); ++code) EXPECT_EQ(decode(encode(code, bits), bits), code);
}

TEST(Metadata, CanonicalPatternKeepsNonZerosAndFillsWithTheLowest) {
  for (unsigned mask = 0; mask < 1u << kQuad; ++mask) {
    const Pattern p = canonical_pattern(mask);
    std::vector<int> nonzero, zero;
    for (int i = 0; i < kQuad; ++i) (mask >> i & 1 ? nonzero : zero).push_back(i);
    if (nonzero.size() > kKeptPerQuad) {
      EXPECT_EQ(p.first, -1) << mask;
      EXPECT_EQ(p.second, -1) << mask;
      EXPECT_FALSE(valid_meta(pack::canonical_nibble(mask))) << mask;
      continue;
    }
    std::set<int> expected(nonzero.begin(), nonzero.end());
    for (size_t i = 0; expected.size() < kKeptPerQuad; ++i) expected.insert(zero[i]);
    EXPECT_EQ(p.first, *expected.begin()) << mask;
    EXPECT_EQ(p.second, *expected.rbegin()) << mask;
    EXPECT_TRUE(valid_meta(meta_nibble(p)));
    EXPECT_EQ(meta_pattern(meta_nibble(p)).first, p.first);
    EXPECT_EQ(meta_pattern(meta_nibble(p)).second, p.second);
    EXPECT_EQ(pack::canonical_nibble(mask), meta_nibble(p));
  }
}

TEST(Metadata, ExactlySixNibblesAreValid) {
  int valid = 0;
  for (uint32_t nibble = 0; nibble < 1u << kMetaBits; ++nibble) valid += valid_meta(nibble);
  EXPECT_EQ(valid, 6);
}

}  // namespace
}  // namespace sparse_marlin
