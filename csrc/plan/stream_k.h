// Stream-K (Osama et al., 2301.03598): where output tiles don't fill the last round of blocks, the column tiles of the last rounds are
// counted through and every block takes an equal range of them. A range may begin and end inside an output tile; the block that
// has a tile's first column tiles adds the sums of the others. Read by the planner, the launcher and the kernel.
#pragma once
#include <algorithm>
#include <cstdint>

#include "format/packed_24.h"

namespace sparse_marlin {

inline constexpr int kMinRangeCols = 2;  // less is not worth a block

struct StreamK {
  int whole_tiles;  // output tiles done whole, in turns, before the ranges
  int64_t step;     // column tiles of a range, with 32 bits behind the point, rounded up; 0: there are no ranges

  // The first column tile of a range, counted through those that are streamed: floor(range x column tiles / ranges), without the
  // division, as long as there are fewer than 2^16 ranges.
  SPARSE_MARLIN_HD constexpr int start(int range) const { return static_cast<int>(range * step >> 32); }
};

// Of so many blocks, or no ranges where whole tiles keep all blocks busy to the end.
constexpr StreamK stream_k(int64_t tiles, int64_t col_tiles, int64_t blocks) {
  if (tiles % blocks == 0) return {static_cast<int>(tiles), 0};
  // One full round is streamed with what is left over: ranges are then at least as long as a tile, and a tile has two or three.
  const int64_t whole = tiles > blocks ? (tiles / blocks - 1) * blocks : 0;
  const int64_t cols = (tiles - whole) * col_tiles;
  return {static_cast<int>(whole), ((cols << 32) + blocks - 1) / blocks};
}

// How many of `most` blocks take part. Where each tile has several, the same number for each if that is nearly all: a range across
// the end of a tile costs two starts.
constexpr int64_t stream_k_blocks(int64_t tiles, int64_t col_tiles, int64_t most) {
  most = std::max<int64_t>(1, std::min(most, tiles * col_tiles / kMinRangeCols));
  const int64_t even = most / tiles * tiles;
  return even > 0 && 10 * even >= 9 * most ? even : most;
}

}  // namespace sparse_marlin
