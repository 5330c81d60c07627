// The packed weight format "packed_24": 2:4-sparse 4-bit or 8-bit codes, with their metadata, in one stream of 32-bit words.
// This header is the specification. Host code, kernels, Python (through _core) and tests read it; no other file repeats a
// number of it. It includes no torch and no CUDA header. Changing a byte of the format means a new kVersion.
//
// Words used here
//   row     an output feature (n); the packed tensor holds ceil(n / 64) * 64 rows
//   column  a dense input feature (k); the packed tensor holds ceil(k / 128) * 128 columns
//   quad    four consecutive columns of one row; at most two of its values are non-zero, exactly two are stored ("kept")
//   kept j  the j-th stored value of a row: quad j / 2, first (j % 2 == 0) or second value of it
//   step    32 columns: what one sparse MMA (mma.sp m16n8k32, wgmma.sp m64nNk32) consumes; 8 quads, 16 kept values a row
//   slice   16 rows x 128 columns = 4 steps: one run of bytes, codes first, then metadata
//   tile    64 rows x 128 columns = 4 slices one after another, the rows of one wgmma
//
// Layout of the tensor: int32 [ceil(n / 64)][ceil(k / 128) * tile_words(bits)]. Dimension 0 walks along n, dimension 1 along k,
// so cutting either dimension at tile boundaries cuts the matrix (tensor parallelism needs no repacking).
//
// Layout of a slice. Lane l of a warp owns rows g = l / 4 and g + 8 and, with c = l % 4, in each step the kept values
// 2c, 2c + 1, 8 + 2c and 9 + 2c of both: this is the A fragment of both instructions. Its four 16-bit-pair registers are
//   register r: row g + 8 * (r % 2), kept values 8 * (r / 2) + 2c (low half) and + 1 (high half)
//   4-bit codes  512 B: 16 bytes a lane, word = step; register r in bits 4r..4r+3 (low) and 16+4r..16+4r+3 (high), so that one
//                mask leaves a pair in the two halves of a register
//   8-bit codes 1024 B: two planes of 16 bytes a lane, plane = step / 2; a step has two words, word = r / 2, register r in
//                bytes 2 * (r % 2) (low) and + 1 (high), so that one byte permutation spreads a pair
//   metadata     256 B: 8 bytes a lane, word = step / 2; lanes c = 0, 1 serve the even step (sparsity selector 0), c = 2, 3 the
//                odd one (selector 1); bits 0-15 are row g, quads 4 * (c % 2) .. + 3 of that step, bits 16-31 the same of row
//                g + 8; a quad's nibble is first | second << 2, the two column indices inside the quad, first < second
//                (the rising order that mma.sp::ordered_metadata requires)
// A code q is stored biased, as q + 2^(bits-1) ("uint4b8", "uint8b128"). Padding rows, columns and unused kept slots hold code 0.
// Where a quad has fewer than two non-zero codes, canonical_pattern says which positions are kept: packing is a function, so
// every packer writes the same bytes.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define SPARSE_MARLIN_HD __host__ __device__
#else
#define SPARSE_MARLIN_HD
#endif

namespace sparse_marlin::format {

inline constexpr char kName[] = "sparse_marlin.packed_24";
inline constexpr int kVersion = 1;

inline constexpr int kQuad = 4;
inline constexpr int kKeptPerQuad = 2;
inline constexpr int kStepCols = 32;
inline constexpr int kStepQuads = kStepCols / kQuad;
inline constexpr int kStepKept = kStepQuads * kKeptPerQuad;
inline constexpr int kSliceRows = 16;
inline constexpr int kSliceCols = 128;
inline constexpr int kSliceSteps = kSliceCols / kStepCols;
inline constexpr int kSliceQuads = kSliceCols / kQuad;
inline constexpr int kTileSlices = 4;
inline constexpr int kTileRows = kTileSlices * kSliceRows;
inline constexpr int kTileCols = kSliceCols;

inline constexpr int kLanes = 32;           // of the warp that consumes a slice
inline constexpr int kLanesPerRow = 4;      // lanes that share row g: l = 4 g + c
inline constexpr int kHalfRows = 8;         // rows g and g + 8 belong to one lane
inline constexpr int kLaneVectorWords = 4;  // codes are read 16 bytes a lane
inline constexpr int kMetaLaneWords = 2;    // metadata 8 bytes a lane
inline constexpr int kMetaBits = 4;         // a quad's nibble: two 2-bit column indices
inline constexpr int kWordBytes = 4;
inline constexpr int kWordBits = 32;

SPARSE_MARLIN_HD constexpr bool valid_bits(int num_bits) { return num_bits == 4 || num_bits == 8; }
SPARSE_MARLIN_HD constexpr int code_min(int num_bits) { return -(1 << (num_bits - 1)); }
SPARSE_MARLIN_HD constexpr int code_max(int num_bits) { return (1 << (num_bits - 1)) - 1; }
SPARSE_MARLIN_HD constexpr uint32_t encode(int code, int num_bits) {
  return static_cast<uint32_t>(code - code_min(num_bits));
}
SPARSE_MARLIN_HD constexpr int decode(uint32_t stored, int num_bits) {
  return static_cast<int>(stored) + code_min(num_bits);
}

// --- sizes, in 32-bit words -----------------------------------------------------------------------------------------------
SPARSE_MARLIN_HD constexpr int slice_code_words(int num_bits) {
  return kSliceRows * kSliceQuads * kKeptPerQuad * num_bits / kWordBits;
}
inline constexpr int kSliceMetaWords = kSliceRows * kSliceQuads * kMetaBits / kWordBits;
SPARSE_MARLIN_HD constexpr int slice_words(int num_bits) { return slice_code_words(num_bits) + kSliceMetaWords; }
SPARSE_MARLIN_HD constexpr int slice_bytes(int num_bits) { return slice_words(num_bits) * kWordBytes; }
SPARSE_MARLIN_HD constexpr int tile_words(int num_bits) { return slice_words(num_bits) * kTileSlices; }
SPARSE_MARLIN_HD constexpr int tile_bytes(int num_bits) { return tile_words(num_bits) * kWordBytes; }
SPARSE_MARLIN_HD constexpr int64_t row_tiles(int64_t n) { return (n + kTileRows - 1) / kTileRows; }
SPARSE_MARLIN_HD constexpr int64_t col_tiles(int64_t k) { return (k + kTileCols - 1) / kTileCols; }
// Words of one row of tiles, for k columns: the size of dimension 1 of the packed tensor.
SPARSE_MARLIN_HD constexpr int64_t packed_row_words(int64_t k, int num_bits) {
  return col_tiles(k) * tile_words(num_bits);
}

static_assert(slice_bytes(4) == 512 + 256 && slice_bytes(8) == 1024 + 256);
static_assert(tile_bytes(4) * 8 == kTileRows * kTileCols * 3,
              "a 4-bit weight costs 2 bits of codes and 1 bit of metadata");
static_assert(kSliceMetaWords == kLanes * kMetaLaneWords);

// --- bijections -----------------------------------------------------------------------------------------------------------
// Where a field lies inside a slice: `word` counts from the slice's first word, `shift` is the lowest bit.
struct Location {
  int word;
  int shift;
};

// The code of kept value `kept` (0 .. kSliceQuads * kKeptPerQuad - 1) of row `row` (0 .. kSliceRows - 1) of a slice.
SPARSE_MARLIN_HD constexpr Location code_location(int row, int kept, int num_bits) {
  const int step = kept / kStepKept, s = kept % kStepKept;
  const int lane = (row % kHalfRows) * kLanesPerRow + (s % kHalfRows) / 2;
  const int reg = row / kHalfRows + 2 * (s / kHalfRows), half = s % 2;
  if (num_bits == 4) return {lane * kLaneVectorWords + step, 4 * reg + 16 * half};
  const int plane = step / 2;
  return {(plane * kLanes + lane) * kLaneVectorWords + (step % 2) * 2 + reg / 2, 8 * (2 * (reg % 2) + half)};
}

// The metadata nibble of quad `quad` (0 .. kSliceQuads - 1) of row `row` of a slice.
SPARSE_MARLIN_HD constexpr Location meta_location(int row, int quad, int num_bits) {
  const int step = quad / kStepQuads, t = quad % kStepQuads;
  const int lane = (row % kHalfRows) * kLanesPerRow + (step % 2) * 2 + t / 4;
  return {slice_code_words(num_bits) + lane * kMetaLaneWords + step / 2, kMetaBits * (t % 4) + 16 * (row / kHalfRows)};
}

struct KeptCoord {
  int row;
  int kept;
};
struct QuadCoord {
  int row;
  int quad;
};

// Inverse of code_location: `word` < slice_code_words, `shift` a multiple of num_bits.
SPARSE_MARLIN_HD constexpr KeptCoord code_coord(int word, int shift, int num_bits) {
  int lane = 0, step = 0, reg = 0, half = 0;
  if (num_bits == 4) {
    lane = word / kLaneVectorWords;
    step = word % kLaneVectorWords;
    reg = shift % 16 / 4;
    half = shift / 16;
  } else {
    const int plane = word / (kLanes * kLaneVectorWords), in_lane = word % kLaneVectorWords;
    lane = word / kLaneVectorWords % kLanes;
    step = plane * 2 + in_lane / 2;
    reg = (in_lane % 2) * 2 + shift / 16;
    half = shift % 16 / 8;
  }
  const int g = lane / kLanesPerRow, c = lane % kLanesPerRow;
  return {g + kHalfRows * (reg % 2), step * kStepKept + kHalfRows * (reg / 2) + 2 * c + half};
}

// Inverse of meta_location: `word` counts from the slice's first word, code words included.
SPARSE_MARLIN_HD constexpr QuadCoord meta_coord(int word, int shift, int num_bits) {
  const int m = word - slice_code_words(num_bits), lane = m / kMetaLaneWords;
  const int g = lane / kLanesPerRow, c = lane % kLanesPerRow;
  const int step = (m % kMetaLaneWords) * 2 + c / 2;
  return {g + kHalfRows * (shift / 16), step * kStepQuads + 4 * (c % 2) + shift % 16 / kMetaBits};
}

// First word, inside the row of tiles, of the slice that holds (row n, column k). The row of tiles is n / kTileRows.
SPARSE_MARLIN_HD constexpr int64_t slice_offset_words(int64_t n, int64_t k, int num_bits) {
  return k / kTileCols * tile_words(num_bits) + n % kTileRows / kSliceRows * slice_words(num_bits);
}

// --- metadata -------------------------------------------------------------------------------------------------------------
struct Pattern {
  int first;   // column index inside the quad, 0..3
  int second;  // first < second
};
SPARSE_MARLIN_HD constexpr uint32_t meta_nibble(Pattern p) { return static_cast<uint32_t>(p.first | p.second << 2); }
SPARSE_MARLIN_HD constexpr Pattern meta_pattern(uint32_t nibble) {
  return {static_cast<int>(nibble & 3), static_cast<int>(nibble >> 2 & 3)};
}
SPARSE_MARLIN_HD constexpr bool valid_meta(uint32_t nibble) { return (nibble & 3) < (nibble >> 2 & 3); }

// Bit i of `nonzero` says that position i of the quad is non-zero. The kept positions are the non-zero ones, filled up to two
// with the lowest zero positions. More than two non-zero values: {-1, -1}.
SPARSE_MARLIN_HD constexpr Pattern canonical_pattern(unsigned nonzero) {
  unsigned kept = nonzero;
  int count = 0;
  for (int i = 0; i < kQuad; ++i) count += nonzero >> i & 1;
  if (count > kKeptPerQuad) return {-1, -1};
  for (int i = 0; i < kQuad && count < kKeptPerQuad; ++i) {
    if (!(kept >> i & 1)) {
      kept |= 1u << i;
      ++count;
    }
  }
  Pattern p{-1, -1};
  for (int i = kQuad - 1; i >= 0; --i) {
    if (kept >> i & 1) {
      p.second = p.first < 0 ? p.second : p.first;
      p.first = i;
      if (p.second < 0) p.second = i;
    }
  }
  return p;
}
static_assert(meta_nibble(canonical_pattern(0b0000)) == (0u | 1u << 2));
static_assert(meta_nibble(canonical_pattern(0b0100)) == (0u | 2u << 2));
static_assert(meta_nibble(canonical_pattern(0b0001)) == (0u | 1u << 2));
static_assert(meta_nibble(canonical_pattern(0b1010)) == (1u | 3u << 2));

}  // namespace sparse_marlin::format
