// The layout of "marlin-24" checkpoints (the packed weights of Sparse-Marlin and of the loaders that followed it), and how it
// and packed_24 differ. Both hold the same codes with the same bias and the same metadata nibbles, in other places:
//
//   codes  int32 [k / 32][n * 16 * bits / 32]: a row is a step of 32 columns (16 kept values), in runs of 64 output features
//   meta   int16 [k / 32][n * 2]: one value holds the nibbles of the 4 quads of a block of 16 columns, low nibble first
//
// n is a multiple of 64, k of 32; there is no padding. Where a quad has fewer than two non-zero codes the old packers keep other
// positions than packed_24 (kept_nibbles below): what is converted is brought to the convention of its new format, so that
// importing and exporting are functions and undo one another.
#pragma once
#include <cstdint>

#include "format/packed_24.h"
#include "pack/pack_core.h"

namespace sparse_marlin::legacy {

inline constexpr int kRunRows = 64;    // output features of a run
inline constexpr int kBlockCols = 16;  // columns whose nibbles share a metadata value
inline constexpr int kBlockQuads = kBlockCols / format::kQuad;
inline constexpr int kStepBlocks = format::kStepCols / kBlockCols;
inline constexpr int kMetaValueBits = kBlockQuads * format::kMetaBits;

constexpr bool valid_shape(int64_t n, int64_t k) {
  return n > 0 && k > 0 && n % kRunRows == 0 && k % format::kStepCols == 0;
}
SPARSE_MARLIN_HD constexpr int run_words(int num_bits) {
  return kRunRows * format::kStepKept * num_bits / format::kWordBits;
}
// Words of a row of codes, values of a row of metadata.
SPARSE_MARLIN_HD constexpr int64_t row_words(int64_t n, int num_bits) { return n / kRunRows * run_words(num_bits); }
SPARSE_MARLIN_HD constexpr int64_t row_meta(int64_t n) { return n * kStepBlocks; }

// --- places -----------------------------------------------------------------------------------------------------------------
// Kept value `kept` (0 .. 15 of a step) of output feature `row` (0 .. 63 of a run). A lane of 32 serves 8 features (its upper
// bits) at 4 kept values: 2c, 2c + 1, 2c + 8, 2c + 9 with c its lower two bits. Two features, 4 apart, make 8 values, of which
// the even ones are stored before the odd ones; with 8 bits that holds for the four values of one feature.
SPARSE_MARLIN_HD constexpr format::Location code_location(int row, int kept, int num_bits) {
  const int lane = row / 8 * 4 + kept % 8 / 2;
  const int in_feature = kept % 2 + 2 * (kept / 8), half = row % 8 / 4, unit = lane * 4 + row % 4;
  if (num_bits == 4) {
    const int value = half * 4 + in_feature;
    return {unit, 4 * (value / 2 + 4 * (value % 2))};
  }
  return {unit * 2 + half, 8 * (in_feature / 2 + 2 * (in_feature % 2))};
}

// Inverse: `word` of a run, `shift` a multiple of num_bits.
SPARSE_MARLIN_HD constexpr format::KeptCoord code_coord(int word, int shift, int num_bits) {
  const int unit = num_bits == 4 ? word : word / 2, lane = unit / 4, place = shift / num_bits;
  const int value = num_bits == 4 ? place % 4 * 2 + place / 4 : place % 2 * 2 + place / 2;
  const int half = num_bits == 4 ? value / 4 : word % 2, in_feature = value % 4;
  return {lane / 4 * 8 + half * 4 + unit % 4, lane % 4 * 2 + in_feature % 2 + in_feature / 2 * 8};
}

// The metadata value of block `block` (0 or 1 of a step) of feature `row` of a run: its place in the run's 128 values.
SPARSE_MARLIN_HD constexpr int meta_place(int row, int block) {
  return row / 4 % 2 + 2 * block + 4 * (row % 2) + 8 * (row / 8) + 64 * (row / 2 % 2);
}

struct BlockCoord {
  int row;
  int block;
};
SPARSE_MARLIN_HD constexpr BlockCoord meta_coord(int place) {
  return {place / 4 % 2 + place / 64 * 2 + place % 2 * 4 + place / 8 % 8 * 8, place / 2 % 2};
}

// --- quads ------------------------------------------------------------------------------------------------------------------
// Both codes biased, as stored.
struct KeptQuad {
  uint32_t first;
  uint32_t second;
  uint32_t nibble;
};

// Metadata nibbles by the mask of non-zero positions, 4 bits each. The old packers' choice for fewer than two: a lone value in
// position 0 is kept with position 2, one in position 1 with 2, and all else with positions 2 and 3.
constexpr uint64_t old_nibbles() {
  uint64_t all = pack::canonical_nibbles();
  for (unsigned mask : {0b0000u, 0b0001u, 0b0010u, 0b0100u, 0b1000u}) {
    const format::Pattern kept = mask == 0b0001   ? format::Pattern{0, 2}
                                 : mask == 0b0010 ? format::Pattern{1, 2}
                                                  : format::Pattern{2, 3};
    const int at = static_cast<int>(mask) * format::kMetaBits;
    all &= ~(uint64_t{0xf} << at);
    all |= static_cast<uint64_t>(format::meta_nibble(kept)) << at;
  }
  return all;
}

enum class Convention { kOld, kNew };
constexpr uint64_t nibbles_of(Convention convention) {
  return convention == Convention::kOld ? old_nibbles() : pack::canonical_nibbles();
}

// What becomes of a quad, by its nibble and whether its two codes are not zero: the new nibble, and in kSwap whether the codes
// change places (where a lone one moves to the other slot), in kInvalid whether the nibble is not two rising indices.
inline constexpr uint32_t kSwap = 0x10, kInvalid = 0x80, kNibble = (1u << format::kMetaBits) - 1;
template <Convention kTo>
SPARSE_MARLIN_HD constexpr uint32_t rekept(uint32_t nibble, bool first, bool second) {
  constexpr uint64_t kNibbles = nibbles_of(kTo);
  if (!format::valid_meta(nibble)) return kInvalid | nibble;
  if (first && second) return nibble;
  const format::Pattern from = format::meta_pattern(nibble);
  const unsigned mask = static_cast<unsigned>(first) << from.first | static_cast<unsigned>(second) << from.second;
  const uint32_t kept = static_cast<uint32_t>(kNibbles >> (mask * format::kMetaBits)) & kNibble;
  const format::Pattern to = format::meta_pattern(kept);
  const bool swap = (first && to.first != from.first) || (second && to.second != from.second);
  return kept | (swap ? kSwap : 0);
}

// The same as a table for processors, to which the quads short of a code come at random: a branch would be mispredicted.
struct Rekept {
  uint8_t at[1 << (format::kMetaBits + format::kKeptPerQuad)];
};
template <Convention kTo>
constexpr Rekept make_rekept() {
  Rekept table{};
  for (uint32_t i = 0; i < sizeof(table.at); ++i) {
    table.at[i] = static_cast<uint8_t>(rekept<kTo>(i & kNibble, i >> 4 & 1, i >> 5 & 1));
  }
  return table;
}
template <Convention kTo>
inline constexpr Rekept kRekept = make_rekept<kTo>();

// Brings a quad to a convention. Returns kInvalid or 0.
template <Convention kTo>
SPARSE_MARLIN_HD inline uint32_t rekeep(KeptQuad& quad, int num_bits) {
  const bool first = quad.first != format::encode(0, num_bits), second = quad.second != format::encode(0, num_bits);
#if defined(__CUDA_ARCH__)
  const uint32_t entry = rekept<kTo>(quad.nibble, first, second);
#else
  const uint32_t entry =
      kRekept<kTo>.at[quad.nibble | static_cast<uint32_t>(first) << 4 | static_cast<uint32_t>(second) << 5];
#endif
  const uint32_t changed = (quad.first ^ quad.second) & (0u - (entry >> 4 & 1));
  quad.first ^= changed;
  quad.second ^= changed;
  quad.nibble = entry & kNibble;
  return entry & kInvalid;
}

// --- that this file agrees with itself --------------------------------------------------------------------------------------
constexpr bool places_are_bijections(int num_bits) {
  for (int row = 0; row < kRunRows; ++row) {
    for (int kept = 0; kept < format::kStepKept; ++kept) {
      const format::Location at = code_location(row, kept, num_bits);
      const format::KeptCoord back = code_coord(at.word, at.shift, num_bits);
      if (at.word < 0 || at.word >= run_words(num_bits) || back.row != row || back.kept != kept) return false;
      // Both codes of a quad are in one word, here as in packed_24.
      if (kept % 2 == 1 && code_location(row, kept - 1, num_bits).word != at.word) return false;
    }
    for (int block = 0; block < kStepBlocks; ++block) {
      const BlockCoord back = meta_coord(meta_place(row, block));
      if (back.row != row || back.block != block) return false;
    }
  }
  return true;
}
static_assert(places_are_bijections(4) && places_are_bijections(8));
static_assert((old_nibbles() & 0xfff) == 0b1001'1000'1110);
static_assert((old_nibbles() >> 16 & 0xf) == 0b1110 && (old_nibbles() >> 32 & 0xf) == 0b1110);

}  // namespace sparse_marlin::legacy
