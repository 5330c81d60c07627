// float16 and bfloat16 to float32 and back, in plain integer arithmetic: rounding to nearest even, subnormals,
// infinities and NaN kept. For the portable paths and for tests; the vector paths use the processor's instructions
// where it has them.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>

#include "format/problem.h"

namespace sparse_marlin {

inline float bfloat16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t quiet = bits >> 16 | 0x0040u;  // rounding could carry a NaN into infinity
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(is_nan ? quiet : rounded);
}

// All three cases are computed and one is masked in: with a branch or a selection, loops over this stay scalar, since
// the compiler will not do the multiplication of a case that was not asked for.
inline float float16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  const uint32_t is_small = 0u - static_cast<uint32_t>(magnitude < 0x0400u);
  const uint32_t is_special = 0u - static_cast<uint32_t>(magnitude >= 0x7c00u);
  // Zero or subnormal: units of 2^-24, exact.
  const auto small = std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t normal = ((magnitude << 13) + ((127u - 15u) << 23)) | (is_special & 0x7f800000u);
  return std::bit_cast<float>(sign | (small & is_small) | (normal & ~is_small));
}

inline uint16_t float_to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude <
      0x38800000u) {  // below 2^-14: adding 0.5 leaves units of 2^-24 in the low bits, rounded by the addition
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f)));
  }
  const uint32_t rebiased = magnitude - ((127u - 15u) << 23);
  return static_cast<uint16_t>(sign | (rebiased + 0xfffu + (rebiased >> 13 & 1)) >> 13);
}

constexpr int dtype_bytes(DType t) { return t == DType::kFloat32 ? 4 : 2; }

// Element `index` of an array of `type`.
inline float load_float(const void* data, DType type, int64_t index) {
  if (type == DType::kFloat32) {
    float value;
    std::memcpy(&value, static_cast<const char*>(data) + index * 4, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(data) + index * 2, sizeof(bits));
  return type == DType::kFloat16 ? float16_to_float(bits) : bfloat16_to_float(bits);
}

inline void store_float(void* data, DType type, int64_t index, float value) {
  if (type == DType::kFloat32) {
    std::memcpy(static_cast<char*>(data) + index * 4, &value, sizeof(value));
    return;
  }
  const uint16_t bits = type == DType::kFloat16 ? float_to_float16(value) : float_to_bfloat16(value);
  std::memcpy(static_cast<char*>(data) + index * 2, &bits, sizeof(bits));
}

}  // namespace sparse_marlin
