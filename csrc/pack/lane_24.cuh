// What one lane of the warp that packs or unpacks a slice is responsible for. Lane 4 g + c takes quads c and c + 4 of every step
// of rows g and g + 8: all that the format puts into the code words of this lane, so that these are made in its registers. Only
// nibbles change lanes: the four lanes of a row have one of each four nibbles of one another's metadata.
//
// A quad of a lane is named by (i, s, h): row g + 8 i, step s, the lower (h = 0) or the upper quad of the two.
#pragma once
#include <cstdint>

#include "format/packed_24.h"

namespace sparse_marlin::pack {

inline constexpr int kRowHalves = format::kSliceRows / format::kHalfRows;
inline constexpr int kStepHalves = format::kStepQuads / format::kLanesPerRow;
inline constexpr int kThreads = format::kTileSlices * format::kLanes;  // a block a tile
inline constexpr unsigned kWholeWarp = 0xffffffffu;

// One T for every quad of a lane.
template <class T>
struct LaneQuads {
  T at[kRowHalves][format::kSliceSteps][kStepHalves];
};

// Calls body(i, s, h) for every quad of a lane; all three are constants once the compiler has unrolled the loops.
template <class Body>
__device__ void each_quad(const Body& body) {
#pragma unroll
  for (int i = 0; i < kRowHalves; ++i) {
#pragma unroll
    for (int s = 0; s < format::kSliceSteps; ++s) {
#pragma unroll
      for (int h = 0; h < kStepHalves; ++h) body(i, s, h);
    }
  }
}

// --- the lane in the weight -----------------------------------------------------------------------------------------------
constexpr int rows_to(int i) { return i * format::kHalfRows; }
constexpr int cols_to(int s, int h) { return s * format::kStepCols + h * (format::kLanesPerRow * format::kQuad); }

struct LanePlace {
  int lane;
  int g;
  int c;
  int64_t row_tile;
  int64_t slice_at;  // first word of the slice in the row of tiles
  int64_t row;       // of quad (0, 0, 0)
  int64_t col;
  bool whole;     // all of the slice is in the weight
  int rows_left;  // rows of the weight from `row` on, at most a slice's; not positive where there are none
  int cols_left;

  __device__ LanePlace(int64_t n, int64_t k, int num_bits) {
    const unsigned cols = static_cast<unsigned>(format::col_tiles(k));
    lane = threadIdx.x % format::kLanes;
    g = lane / format::kLanesPerRow;
    c = lane % format::kLanesPerRow;
    row_tile = blockIdx.x / cols;
    const int64_t row0 = row_tile * format::kTileRows + threadIdx.x / format::kLanes * format::kSliceRows;
    const int64_t col0 = static_cast<int64_t>(blockIdx.x % cols) * format::kTileCols;
    slice_at = format::slice_offset_words(row0, col0, num_bits);
    row = row0 + g;
    col = col0 + c * format::kQuad;
    whole = row0 + format::kSliceRows <= n && col0 + format::kSliceCols <= k;
    rows_left = static_cast<int>(min(n - row, int64_t{format::kSliceRows}));
    cols_left = static_cast<int>(min(k - col, int64_t{format::kSliceCols}));
  }
  __device__ bool inside(int i, int s, int h) const { return rows_to(i) < rows_left && cols_to(s, h) < cols_left; }
};

// --- the lane in the packed slice -------------------------------------------------------------------------------------------
// The words of codes of a lane in the order of its 16-byte vectors.
template <int kBits>
struct LaneCodes {
  static constexpr int kPlaneWords = format::kLanes * format::kLaneVectorWords;
  static constexpr int kPlanes = format::slice_code_words(kBits) / kPlaneWords;
  static constexpr int kWords = kPlanes * format::kLaneVectorWords;
  // From the lowest bit of the first code of a quad to that of the second, which is in the same word.
  static constexpr int kGap = format::code_location(0, 1, kBits).shift - format::code_location(0, 0, kBits).shift;

  // Where the first code of a quad lies; read off lane 0, as all lanes are alike.
  static constexpr format::Location first(int i, int s, int h) {
    const int quad = cols_to(s, h) / format::kQuad;
    const format::Location at = format::code_location(rows_to(i), quad * format::kKeptPerQuad, kBits);
    return {at.word / kPlaneWords * format::kLaneVectorWords + at.word % kPlaneWords, at.shift};
  }
};

// Which lane of a row has the nibble of a quad and in which of its words; the shift is that of the source lane plus that of the row.
constexpr int meta_lane(int s, int h) { return s % 2 * kStepHalves + h; }
constexpr int meta_word(int s) { return s / 2; }
constexpr int meta_shift(int c) { return c * format::kMetaBits; }
inline constexpr int kMetaHighRow = format::kWordBits / 2;

// That the format is what this file says.
template <int kBits>
constexpr bool lanes_own_their_words() {
  using Codes = LaneCodes<kBits>;
  for (int lane = 0; lane < format::kLanes; ++lane) {
    const int g = lane / format::kLanesPerRow, c = lane % format::kLanesPerRow;
    for (int q = 0; q < kRowHalves * format::kSliceSteps * kStepHalves; ++q) {
      const int i = q / (format::kSliceSteps * kStepHalves), s = q / kStepHalves % format::kSliceSteps,
                h = q % kStepHalves;
      const int row = g + rows_to(i), quad = c + cols_to(s, h) / format::kQuad;
      const format::Location want = Codes::first(i, s, h);
      const int plane = want.word / format::kLaneVectorWords, in_vector = want.word % format::kLaneVectorWords;
      const int word = plane * Codes::kPlaneWords + lane * format::kLaneVectorWords + in_vector;
      for (int j = 0; j < format::kKeptPerQuad; ++j) {
        const format::Location code = format::code_location(row, quad * format::kKeptPerQuad + j, kBits);
        if (code.word != word || code.shift != want.shift + j * Codes::kGap) return false;
      }
      const format::Location meta = format::meta_location(row, quad, kBits);
      const int meta_at = (g * format::kLanesPerRow + meta_lane(s, h)) * format::kMetaLaneWords + meta_word(s);
      if (meta.word != format::slice_code_words(kBits) + meta_at) return false;
      if (meta.shift != meta_shift(c) + i * kMetaHighRow) return false;
    }
  }
  return true;
}
static_assert(lanes_own_their_words<4>() && lanes_own_their_words<8>());

}  // namespace sparse_marlin::pack
