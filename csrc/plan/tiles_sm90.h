// The tiles of the Hopper kernel (wgmma.sp, compute capability 9.0): the only list of them. Plans number the tiles of all kernels
// through: first those of plan/tiles.h, then these.
//
// A block is one producer and `consumers` warpgroups; each of them computes `panels` panels of 64 features x block_m tokens. Many
// features and few tokens: wgmma.sp reads its activations at the full rate of shared memory, so whatever else touches shared memory
// costs time, and more features share one copy of the activations. The blocks of a cluster lie along features and share it further.
#pragma once
#include <array>

#include "format/packed_24.h"
#include "plan/tiles.h"

namespace sparse_marlin {

inline constexpr int kWarpgroupThreads = 128;

struct TileSm90 {
  int block_m;
  int consumers;
  int panels;
  int cluster;

  constexpr int row_tiles() const { return consumers * panels; }  // 64-row tiles of the packed weight
  constexpr int block_n() const { return row_tiles() * format::kTileRows; }
  constexpr int threads() const { return (consumers + 1) * kWarpgroupThreads; }
  // The producer hands registers to the consumers; multiples of 8, and together no more than the block was launched with.
  constexpr int launch_registers() const { return consumers == 2 ? 168 : 96; }
  constexpr int producer_registers() const { return consumers == 4 ? 32 : block_m * panels > 256 ? 24 : 40; }
  constexpr int consumer_registers() const { return consumers == 4 ? 112 : block_m * panels > 256 ? 240 : 232; }
};

inline constexpr std::array kTilesSm90{
    TileSm90{32, 4, 1, 2}, TileSm90{64, 4, 1, 2},  TileSm90{64, 2, 1, 2},  TileSm90{96, 4, 1, 2},
    TileSm90{96, 2, 2, 2}, TileSm90{128, 2, 1, 2}, TileSm90{128, 2, 2, 2}, TileSm90{192, 2, 2, 2},
};

constexpr bool valid_tile(const TileSm90& t) {
  return t.block_m % 16 == 0 && t.block_m <= 256 && t.block_n() <= 256 && t.cluster <= 2 && t.threads() <= 1024 &&
         t.consumers * t.consumer_registers() + t.producer_registers() <= (t.consumers + 1) * t.launch_registers();
}
constexpr bool valid_tiles_sm90() {
  for (const TileSm90& t : kTilesSm90)
    if (!valid_tile(t)) return false;
  return true;
}
static_assert(valid_tiles_sm90());

inline constexpr int kFirstTileSm90 = static_cast<int>(kTiles.size());
inline constexpr int kNumTiles = kFirstTileSm90 + static_cast<int>(kTilesSm90.size());
constexpr bool is_sm90(int tile) { return tile >= kFirstTileSm90; }
constexpr const TileSm90& tile_sm90(int tile) { return kTilesSm90[tile - kFirstTileSm90]; }
constexpr int block_m(int tile) { return is_sm90(tile) ? tile_sm90(tile).block_m : kTiles[tile].block_m; }
constexpr int block_n(int tile) { return is_sm90(tile) ? tile_sm90(tile).block_n() : kTiles[tile].block_n; }

}  // namespace sparse_marlin
