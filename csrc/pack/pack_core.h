// What the CPU and the CUDA packer share: one quad in, its stored pair and metadata nibble out, and the order in which
// faults are reported. Both packers are made of these functions, so they write the same bytes and name the same fault.
#pragma once
#include <bit>
#include <cstdint>

#include "format/packed_24.h"
#include "format/problem.h"
#include "pack/pack_24.h"

namespace sparse_marlin::pack {

// --- faults ----------------------------------------------------------------------------------------------
// A fault is one number, so that the minimum over all threads, in any order, is the first in row-major order: the
// weight bit (scales are reported before weights), then the position, then the kind. kNoFault is above them all.
inline constexpr uint64_t kNoFault = ~uint64_t{0};
inline constexpr int kFaultBits = 3;
inline constexpr uint64_t kFaultMask = (uint64_t{1} << kFaultBits) - 1;
inline constexpr uint64_t kWeightBit = uint64_t{1} << 62;
static_assert(static_cast<uint64_t>(PackFault::kMetadata) <= kFaultMask);

SPARSE_MARLIN_HD constexpr uint64_t encode_fault(PackFault fault, int64_t row, int64_t col, int64_t row_length) {
  const uint64_t position = static_cast<uint64_t>(row * row_length + col);
  const uint64_t order = fault == PackFault::kScale ? 0 : kWeightBit;
  return order | position << kFaultBits | static_cast<uint64_t>(fault);
}

// `scale_row_length` is n; `weight_row_length` the length that the weight's faults were encoded with.
inline PackStatus decode_fault(uint64_t slot, int64_t scale_row_length, int64_t weight_row_length) {
  if (slot == kNoFault) return {};
  const auto fault = static_cast<PackFault>(slot & kFaultMask);
  const auto position = static_cast<int64_t>((slot & ~kWeightBit) >> kFaultBits);
  const int64_t row_length = fault == PackFault::kScale ? scale_row_length : weight_row_length;
  return {fault, position / row_length, position % row_length};
}

SPARSE_MARLIN_HD constexpr uint64_t min_fault(uint64_t a, uint64_t b) { return a < b ? a : b; }

// --- values ----------------------------------------------------------------------------------------------
// False for NaN and both infinities; no library call, so that host and device agree by construction.
SPARSE_MARLIN_HD inline bool is_finite(float x) { return x - x == 0.0f; }

SPARSE_MARLIN_HD inline bool valid_scale(float s) { return s > 0.0f && is_finite(s); }

// IEEE division, whatever the compiler's flags say about division on the device.
SPARSE_MARLIN_HD inline float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// A code (0 where it may not be stored) and why not.
struct Code {
  int code;
  PackFault fault;
};

SPARSE_MARLIN_HD inline bool is_nonzero(int code) { return code != 0; }
// By its bits: a comparison of floats costs a branch for NaN.
SPARSE_MARLIN_HD inline bool is_nonzero(float value) { return std::bit_cast<uint32_t>(value) << 1 != 0; }

SPARSE_MARLIN_HD inline Code code_of(int code, float /*scale*/, int num_bits) {
  const bool fits = code >= format::code_min(num_bits) && code <= format::code_max(num_bits);
  return {fits ? code : 0, fits ? PackFault::kNone : PackFault::kCodeRange};
}

// The nearest code, ties to even. Half a step outside the range still belongs to the outermost code. Selections instead
// of branches: which values are zero and where is random to the processor.
SPARSE_MARLIN_HD inline Code code_of(float value, float scale, int num_bits) {
  const int lowest = format::code_min(num_bits), highest = format::code_max(num_bits);
  const float steps = divide(value, scale);
  const bool fits = steps >= static_cast<float>(lowest) - 0.5f && steps <= static_cast<float>(highest) + 0.5f;
  // Adding 1.5 * 2^23 leaves no bits for a fraction: the addition itself rounds to the nearest even integer.
  constexpr float kRound = 12582912.0f;
  const int nearest = static_cast<int>(((fits ? steps : 0.0f) + kRound) - kRound);
  const int code = nearest < lowest ? lowest : nearest > highest ? highest : nearest;
  return {code, fits ? PackFault::kNone : is_finite(value) ? PackFault::kCodeRange : PackFault::kNotFinite};
}

// --- quads -----------------------------------------------------------------------------------------------
// The metadata nibbles of all 16 masks of non-zero positions in one register; a mask of more than two has 0, which is
// not valid.
constexpr uint64_t canonical_nibbles() {
  uint64_t all = 0;
  for (unsigned mask = 0; mask < 1u << format::kQuad; ++mask) {
    const format::Pattern p = format::canonical_pattern(mask);
    if (p.first >= 0) all |= static_cast<uint64_t>(format::meta_nibble(p)) << (mask * format::kMetaBits);
  }
  return all;
}
SPARSE_MARLIN_HD constexpr uint32_t canonical_nibble(unsigned mask) {
  constexpr uint64_t kNibbles = canonical_nibbles();
  return static_cast<uint32_t>(kNibbles >> (mask * format::kMetaBits)) & ((1u << format::kMetaBits) - 1);
}
static_assert(!format::valid_meta(canonical_nibble(0b1011)));

// A quad ready to be stored: both codes biased.
struct StoredQuad {
  uint32_t first;
  uint32_t second;
  uint32_t nibble;
  uint64_t fault;
};

// What padding holds.
SPARSE_MARLIN_HD constexpr StoredQuad empty_quad(int num_bits) {
  return {format::encode(0, num_bits), format::encode(0, num_bits), canonical_nibble(0), kNoFault};
}

// The quad that starts at (row, col). Value is int (codes) or float (dequantized values, divided by `scale`). Two or
// fewer values must be non-zero before rounding: dropping a third that rounds to code 0 would hide an error of the
// caller. Which positions are kept follows from the non-zero codes, so floats pack to the bytes of their codes.
template <class Value>
SPARSE_MARLIN_HD inline StoredQuad store_quad(const Value* values, float scale, int num_bits, int64_t row, int64_t col,
                                              int64_t row_length) {
  StoredQuad stored = empty_quad(num_bits);
  unsigned mask = 0;
  for (int i = 0; i < format::kQuad; ++i) mask |= static_cast<unsigned>(is_nonzero(values[i])) << i;
  const uint32_t candidates = canonical_nibble(mask);
  if (!format::valid_meta(candidates)) {
    stored.fault = encode_fault(PackFault::kNotSparse, row, col, row_length);
    return stored;
  }
  const format::Pattern at = format::meta_pattern(candidates);
#if defined(__CUDA_ARCH__)
  // Selected by comparison: an index would send the quad through local memory.
  Value first = values[0], second = values[1];
  for (int i = 1; i < format::kQuad; ++i) {
    if (at.first == i) first = values[i];
    if (at.second == i) second = values[i];
  }
#else
  const Value first = values[at.first], second = values[at.second];
#endif
  const Code a = code_of(first, scale, num_bits), b = code_of(second, scale, num_bits);
  if (a.fault != PackFault::kNone || b.fault != PackFault::kNone) {
    const bool is_first = a.fault != PackFault::kNone;
    stored.fault = encode_fault(is_first ? a.fault : b.fault, row, col + (is_first ? at.first : at.second), row_length);
  }
  stored.nibble = canonical_nibble(static_cast<unsigned>(a.code != 0) << at.first | static_cast<unsigned>(b.code != 0)
                                                                                        << at.second);
  // The quad's codes in a word, a byte each, as differences from what a zero is stored as; then the two kept bytes.
  const uint32_t zero = format::encode(0, num_bits);
  const uint32_t bytes = (format::encode(a.code, num_bits) ^ zero) << (8 * at.first) |
                         (format::encode(b.code, num_bits) ^ zero) << (8 * at.second);
  const format::Pattern kept = format::meta_pattern(stored.nibble);
  stored.first = (bytes >> (8 * kept.first) & 0xff) ^ zero;
  stored.second = (bytes >> (8 * kept.second) & 0xff) ^ zero;
  return stored;
}

// Which row of `scales` column `col` of the weight belongs to.
SPARSE_MARLIN_HD constexpr int64_t group_of(int64_t col, int group_size) {
  return group_size == kChannelwise ? 0 : col / group_size;
}

}  // namespace sparse_marlin::pack
