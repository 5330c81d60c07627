// Packing and unpacking on the CPU: bytes against the format's bijections, round trips, and every fault with its
// position.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "cpu/half.h"
#include "support.h"

namespace sparse_marlin {
namespace {

using namespace format;
using test::Packed;

// What the bijections say a packed tensor holds, field by field.
std::vector<uint32_t> packed_by_definition(const std::vector<int8_t>& codes, int64_t n, int64_t k, int bits) {
  std::vector<uint32_t> words(static_cast<size_t>(row_tiles(n) * packed_row_words(k, bits)), 0);
  for (int64_t row = 0; row < row_tiles(n) * kTileRows; ++row) {
    for (int64_t col = 0; col < col_tiles(k) * kTileCols; col += kQuad) {
      int quad[kQuad] = {};
      unsigned mask = 0;
      for (int i = 0; i < kQuad && row < n && col < k; ++i) {
        quad[i] = codes[static_cast<size_t>(row * k + col + i)];
        mask |= static_cast<unsigned>(quad[i] != 0) << i;
      }
      const Pattern p = canonical_pattern(mask);
      uint32_t* slice =
          &words[static_cast<size_t>(row / kTileRows * packed_row_words(k, bits) + slice_offset_words(row, col, bits))];
      const int r = static_cast<int>(row % kSliceRows), q = static_cast<int>(col % kSliceCols / kQuad);
      const Location first = code_location(r, 2 * q, bits), second = code_location(r, 2 * q + 1, bits),
                     meta = meta_location(r, q, bits);
      slice[first.word] |= encode(quad[p.first], bits) << first.shift;
      slice[second.word] |= encode(quad[p.second], bits) << second.shift;
      slice[meta.word] |= meta_nibble(p) << meta.shift;
    }
  }
  return words;
}

struct Shape {
  int64_t n;
  int64_t k;
};
const Shape kShapes[] = {{1, 4},    {16, 128},  {15, 124},   {17, 132},  {64, 128},
                         {65, 256}, {192, 576}, {130, 1028}, {511, 2044}};

class PackBits : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Bits, PackBits, ::testing::Values(4, 8));

TEST_P(PackBits, WritesTheBytesOfTheFormat) {
  for (const auto [n, k] : kShapes) {
    const auto codes = test::random_codes(n, k, GetParam(), static_cast<uint32_t>(n * 7 + k));
    const Packed packed = test::pack_codes(codes, n, k, GetParam(), test::threaded_for(3));
    ASSERT_TRUE(packed.status.ok());
    EXPECT_EQ(packed.words, packed_by_definition(codes, n, k, GetParam())) << n << "x" << k;
  }
}

TEST_P(PackBits, UnpackingReturnsTheCodes) {
  for (const auto [n, k] : kShapes) {
    const auto codes = test::random_codes(n, k, GetParam(), static_cast<uint32_t>(n + k));
    PackStatus status;
    EXPECT_EQ(test::unpack(test::pack_codes(codes, n, k, GetParam()), &status, test::threaded_for(3)), codes)
        << n << "x" << k;
    EXPECT_TRUE(status.ok());
  }
}

// Dequantized weights of every float type pack to the bytes of their codes.
TEST_P(PackBits, FloatsPackLikeTheirCodes) {
  const int bits = GetParam();
  const int64_t n = 70, k = 324;
  for (int group_size : kGroupSizes) {
    const auto codes = test::random_codes(n, k, bits, 11);
    const int64_t groups = num_groups(k, group_size);
    std::vector<float> scales(static_cast<size_t>(groups * n));
    std::mt19937 rng(5);
    std::uniform_int_distribution<int> exponent(-6, 1);
    for (float& s : scales) s = std::ldexp(1.0f, exponent(rng));  // a power of two: code * scale is exact in every type
    std::vector<float> f32(codes.size());
    std::vector<uint16_t> f16(codes.size()), bf16(codes.size());
    for (int64_t i = 0; i < n * k; ++i) {
      const int64_t group = group_size == kChannelwise ? 0 : i % k / group_size;
      const auto at = static_cast<size_t>(i);
      f32[at] = static_cast<float>(codes[at]) * scales[static_cast<size_t>(group * n + i / k)];
      f16[at] = float_to_float16(f32[at]);
      bf16[at] = float_to_bfloat16(f32[at]);
    }
    const auto expected = test::pack_codes(codes, n, k, bits).words;
    EXPECT_EQ(test::pack_values(f32, WeightType::kFloat32, scales, n, k, group_size, bits).words, expected)
        << group_size;
    EXPECT_EQ(test::pack_values(f16, WeightType::kFloat16, scales, n, k, group_size, bits).words, expected)
        << group_size;
    EXPECT_EQ(test::pack_values(bf16, WeightType::kBFloat16, scales, n, k, group_size, bits).words, expected)
        << group_size;
  }
}

// One row of four columns, one scale.
std::vector<int8_t> round_quad(std::vector<float> quad, float scale, int bits, PackStatus* status) {
  const Packed packed = test::pack_values(quad, WeightType::kFloat32, {scale}, 1, kQuad, kChannelwise, bits);
  *status = packed.status;
  PackStatus unpacked;
  return test::unpack(packed, &unpacked);
}

TEST(Rounding, NearestEvenAndClampedWithinHalfAStep) {
  PackStatus status;
  EXPECT_EQ(round_quad({1.5f, 0, 0, 2.5f}, 1.0f, 4, &status), (std::vector<int8_t>{2, 0, 0, 2}));
  EXPECT_EQ(round_quad({0, -0.5f, -1.5f, 0}, 1.0f, 4, &status), (std::vector<int8_t>{0, 0, -2, 0}));
  EXPECT_EQ(round_quad({7.5f, 0, -8.5f, 0}, 1.0f, 4, &status), (std::vector<int8_t>{7, 0, -8, 0}));
  EXPECT_TRUE(status.ok());
  EXPECT_EQ(round_quad({63.75f, 0, -64.25f, 0}, 0.5f, 8, &status), (std::vector<int8_t>{127, 0, -128, 0}));
  EXPECT_TRUE(status.ok());
  EXPECT_EQ(round_quad({-0.0f, 3, 4, 0.0f}, 1.0f, 4, &status), (std::vector<int8_t>{0, 3, 4, 0}));
  EXPECT_TRUE(status.ok()) << "a negative zero is zero";
  round_quad({0, std::nextafterf(7.5f, 8.0f), 0, 0}, 1.0f, 4, &status);
  EXPECT_EQ(status.fault, PackFault::kCodeRange);
  EXPECT_EQ(status.col, 1);
  round_quad({0, 0, 0, std::nextafterf(-8.5f, -9.0f)}, 1.0f, 4, &status);
  EXPECT_EQ(status.fault, PackFault::kCodeRange);
  EXPECT_EQ(status.col, 3);
}

TEST(Rounding, AThirdTinyValueIsRefusedAndATinyOneAmongTwoIsNotKept) {
  PackStatus status;
  round_quad({1.0f, 1e-30f, 0, 2.0f}, 1.0f, 4, &status);
  EXPECT_EQ(status.fault, PackFault::kNotSparse);
  // Columns 2 and 3 are non-zero, but code 2 is zero: the bytes are those of the codes (0, 0, 0, 2).
  const Packed tiny =
      test::pack_values(std::vector<float>{0, 0, 1e-30f, 2}, WeightType::kFloat32, {1.0f}, 1, kQuad, kChannelwise, 4);
  EXPECT_EQ(tiny.words, test::pack_codes({0, 0, 0, 2}, 1, kQuad, 4).words);
}

void expect_fault(const PackStatus& status, PackFault fault, int64_t row, int64_t col) {
  EXPECT_EQ(status.fault, fault);
  EXPECT_EQ(status.row, row);
  EXPECT_EQ(status.col, col);
}

TEST_P(PackBits, FirstFaultInRowMajorOrder) {
  const int bits = GetParam();
  const int64_t n = 200, k = 516;
  const std::vector<int8_t> sound = test::random_codes(n, k, bits, 3);
  for (int threads : {1, 4}) {
    auto codes = sound;
    const auto break_quad = [&](int64_t row, int64_t col) { std::fill_n(codes.begin() + row * k + col, 3, int8_t{1}); };
    const auto status = [&] { return test::pack_codes(codes, n, k, bits, test::threaded_for(threads)).status; };
    break_quad(199, 512);
    expect_fault(status(), PackFault::kNotSparse, 199, 512);
    break_quad(130, 4);
    break_quad(131, 0);
    expect_fault(status(), PackFault::kNotSparse, 130, 4);
    if (bits == 4) {
      std::fill_n(codes.begin() + 129 * k + 508, 4, int8_t{0});
      codes[static_cast<size_t>(129 * k + 511)] = 8;
      expect_fault(status(), PackFault::kCodeRange, 129, 511);
      codes[static_cast<size_t>(129 * k + 509)] = -9;
      expect_fault(status(), PackFault::kCodeRange, 129, 509);
    }
  }
}

TEST_P(PackBits, NonFiniteValuesAndScales) {
  const int bits = GetParam();
  const int64_t n = 20, k = 256;
  std::vector<float> weight(static_cast<size_t>(n * k), 0.0f), scales(static_cast<size_t>(2 * n), 1.0f);
  const auto status = [&] { return test::pack_values(weight, WeightType::kFloat32, scales, n, k, 128, bits).status; };
  EXPECT_TRUE(status().ok());
  weight[static_cast<size_t>(19 * k + 200)] = -std::numeric_limits<float>::infinity();
  expect_fault(status(), PackFault::kNotFinite, 19, 200);
  weight[static_cast<size_t>(18 * k + 255)] = std::numeric_limits<float>::quiet_NaN();
  expect_fault(status(), PackFault::kNotFinite, 18, 255);
  weight[static_cast<size_t>(18 * k + 254)] = 1e30f;
  expect_fault(status(), PackFault::kCodeRange, 18, 254);
  for (float bad : {0.0f, -1.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    scales[static_cast<size_t>(n + 7)] = bad;
    expect_fault(status(), PackFault::kScale, 1, 7);
    const std::vector<int8_t> codes(static_cast<size_t>(n * k), 0);
    expect_fault(test::pack_values(codes, WeightType::kCodes, scales, n, k, 128, bits).status, PackFault::kScale, 1, 7);
  }
}

TEST_P(PackBits, UnpackNamesTheCorruptedQuad) {
  const int bits = GetParam();
  const int64_t n = 100, k = 260;
  Packed packed = test::pack_codes(test::random_codes(n, k, bits, 9), n, k, bits);
  const auto corrupt = [&](int64_t row, int64_t col, uint32_t nibble) {
    const Location at =
        meta_location(static_cast<int>(row % kSliceRows), static_cast<int>(col % kSliceCols / kQuad), bits);
    uint32_t& word = packed.words[static_cast<size_t>(row / kTileRows * packed.row_words() +
                                                      slice_offset_words(row, col, bits) + at.word)];
    word = (word & ~(0xfu << at.shift)) | nibble << at.shift;
  };
  PackStatus status;
  corrupt(120, 300, 0);  // padding, of rows and of columns
  test::unpack(packed, &status);
  expect_fault(status, PackFault::kMetadata, 120, 300);
  corrupt(77, 132, 0xf);
  corrupt(78, 0, 0x1);
  test::unpack(packed, &status, test::threaded_for(3));
  expect_fault(status, PackFault::kMetadata, 77, 132);
}

TEST(Describe, EveryFaultNamesPlaceAndExpectation) {
  const auto text = [](PackFault fault) { return describe({fault, 12, 345}, 4); };
  for (PackFault fault :
       {PackFault::kScale, PackFault::kNotSparse, PackFault::kCodeRange, PackFault::kNotFinite, PackFault::kMetadata}) {
    EXPECT_NE(text(fault).find("expected"), std::string::npos);
    EXPECT_NE(text(fault).find("got"), std::string::npos);
    EXPECT_NE(text(fault).find("12"), std::string::npos);
    EXPECT_NE(text(fault).find("345"), std::string::npos);
  }
  EXPECT_NE(text(PackFault::kCodeRange).find("-8..7"), std::string::npos);
}

}  // namespace
}  // namespace sparse_marlin
