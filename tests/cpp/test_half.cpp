// Half-precision conversions: every pattern survives, and rounding is to the nearest even.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "cpu/half.h"

namespace sparse_marlin {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();

// The value of a float16 pattern, from its definition.
double float16_value(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31);
  const double fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction != 0 ? static_cast<double>(kNan) : sign * static_cast<double>(kInf);
  return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

TEST(Half, EveryFloat16IsExactAndComesBack) {
  for (uint32_t bits = 0; bits < 1u << 16; ++bits) {
    const float value = float16_to_float(static_cast<uint16_t>(bits));
    const double expected = float16_value(bits);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(value)) << bits;
      EXPECT_TRUE(std::isnan(float16_to_float(float_to_float16(value)))) << bits;
      continue;
    }
    ASSERT_EQ(static_cast<double>(value), expected) << bits;
    ASSERT_EQ(std::signbit(value), bits >> 15 != 0) << bits;
    ASSERT_EQ(float_to_float16(value), bits);
  }
}

TEST(Half, Float16RoundsToNearestEven) {
  // Neighbours of both signs, their midpoint, and a float just beside it.
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const float low = float16_to_float(static_cast<uint16_t>(bits)),
                high = float16_to_float(static_cast<uint16_t>(bits + 1));
    const float middle = (low + high) / 2;  // exact in float32
    ASSERT_EQ(float_to_float16(middle), bits % 2 == 0 ? bits : bits + 1) << bits;
    ASSERT_EQ(float_to_float16(std::nextafterf(middle, 0.0f)), bits) << bits;
    ASSERT_EQ(float_to_float16(std::nextafterf(middle, kInf)), bits + 1) << bits;
    ASSERT_EQ(float_to_float16(-std::nextafterf(middle, kInf)), 0x8000 | (bits + 1)) << bits;
  }
  EXPECT_EQ(float_to_float16(65519.996f), 0x7bff);
  EXPECT_EQ(float_to_float16(65520.0f), 0x7c00);
  EXPECT_EQ(float_to_float16(-3e38f), 0xfc00);
  EXPECT_EQ(float_to_float16(1e-40f), 0);
}

TEST(Half, EveryBFloat16IsExactAndComesBack) {
  for (uint32_t bits = 0; bits < 1u << 16; ++bits) {
    const float value = bfloat16_to_float(static_cast<uint16_t>(bits));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(bfloat16_to_float(float_to_bfloat16(value)))) << bits;
      continue;
    }
    ASSERT_EQ(float_to_bfloat16(value), bits);
  }
}

TEST(Half, BFloat16RoundsToNearestEven) {
  EXPECT_EQ(float_to_bfloat16(1.0f + 0x1p-8f), 0x3f80);            // a tie, down to even
  EXPECT_EQ(float_to_bfloat16(1.0f + 0x1p-7f + 0x1p-8f), 0x3f82);  // a tie, up to even
  EXPECT_EQ(float_to_bfloat16(std::nextafterf(1.0f + 0x1p-8f, 2.0f)), 0x3f81);
  EXPECT_EQ(float_to_bfloat16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_EQ(float_to_bfloat16(-kInf), 0xff80);
  // A NaN whose only set bits are the ones that are cut off must not become infinity.
  EXPECT_TRUE(std::isnan(bfloat16_to_float(float_to_bfloat16(std::bit_cast<float>(0x7f800001u)))));
  EXPECT_TRUE(std::isnan(bfloat16_to_float(float_to_bfloat16(std::bit_cast<float>(0x7fffffffu)))));
}

}  // namespace
}  // namespace sparse_marlin
