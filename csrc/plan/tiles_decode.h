// The tiles of the decode kernel (mma.sp fed by bulk copies, compute capability 9.0), for few tokens: the only list of them. Plans
// number them after those of plan/tiles_sm90.h.
//
// Its warps are warps_n along features x warps_k along k, each with a ring of its own for its weights; the warps along k share out
// the 128-column tiles in turn. So no warp waits for another before the end of an output tile, where their sums meet. Blocks of a
// cluster can split k, too (splits > 1): wide tiles, which read their activations less often, then fill the chip all the same.
#pragma once
#include <array>

#include "format/packed_24.h"
#include "plan/tiles.h"

namespace sparse_marlin {

struct TileDecode {
  int block_m;
  int slices;  // 16-row slices of a warp
  int warps_n;
  int warps_k;
  int turn_cols;  // 128-column tiles that a warp does at once: more overlap, and less overhead for each
  int blocks;     // an SM holds at once: its registers and shared memory are divided so

  constexpr int block_n() const { return slices * warps_n * format::kSliceRows; }
  constexpr int warps() const { return warps_n * warps_k; }
  constexpr int threads() const { return (warps() + 1) * format::kLanes; }  // one warp brings activations and scales
  constexpr int token_blocks() const { return block_m / kMmaTokens; }
};

// Narrow tiles fill the chip where there are few features; wide ones read their activations less often. Two blocks fit an SM, so that
// the next launch can ask for its first weights before this one has finished.
inline constexpr std::array kTilesDecode{
    TileDecode{8, 1, 1, 8, 2, 2},  TileDecode{8, 2, 1, 8, 1, 2},  TileDecode{8, 2, 1, 12, 1, 2},
    TileDecode{8, 2, 2, 4, 2, 2},  TileDecode{8, 4, 2, 4, 1, 2},  TileDecode{16, 1, 1, 8, 1, 2},
    TileDecode{16, 2, 1, 8, 1, 2}, TileDecode{16, 2, 2, 4, 1, 2}, TileDecode{16, 2, 4, 2, 1, 2},
};
inline constexpr int kMaxSplitsDecode = 8;  // a cluster has at most so many blocks

// A bulk copy brings the slices that a warp has of a column tile: they must lie in one 64-row tile.
constexpr bool valid_tiles_decode() {
  for (const TileDecode& t : kTilesDecode) {
    if (format::kTileSlices % t.slices != 0 || t.block_m % kMmaTokens != 0) return false;
    if (t.threads() * t.blocks > 2048) return false;
  }
  return true;
}
static_assert(valid_tiles_decode());

}  // namespace sparse_marlin
