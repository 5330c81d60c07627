// The tiles of the portable mma.sp kernel: the only list of kernels that exist. The launcher's table and the planner are built from
// it, so a plan cannot name a kernel that was not compiled. Sizes in elements: m tokens, n out features.
//
// A block computes block_m x block_n of the output. Its warps are warps_k teams of warps_m x warps_n warps; the teams share out the
// 128-column tiles of k, each with a shared-memory ring of its own, and their float32 sums meet in shared memory at the end. So a
// thin problem (few tokens) keeps many warps busy on few rows, and a team of one warp needs no barrier in its main loop.
#pragma once
#include <array>
#include <cstdint>

#include "format/packed_24.h"

namespace sparse_marlin {

struct Tile {
  int block_m;
  int block_n;
  int warps_m;
  int warps_n;
  int warps_k;
  int min_blocks;  // blocks an SM must hold at once, as far as registers go: the kernel's register budget

  constexpr int warp_m() const { return block_m / warps_m; }
  constexpr int warp_n() const { return block_n / warps_n; }
  constexpr int team_warps() const { return warps_m * warps_n; }
  constexpr int team_threads() const { return team_warps() * format::kLanes; }
  constexpr int threads() const { return team_threads() * warps_k; }
  constexpr int slices() const { return block_n / format::kSliceRows; }
};

inline constexpr int kMmaTokens = 8;  // tokens of one mma.sp

inline constexpr std::array kTiles{
    // Few tokens: mostly one warp a team, eight ways along k. The limit is the weights' bytes; wider tiles save activation traffic,
    // narrower ones fill the chip.
    Tile{8, 16, 1, 1, 8, 4},
    Tile{8, 32, 1, 1, 8, 3},
    Tile{8, 64, 1, 1, 8, 2},
    Tile{8, 128, 1, 2, 4, 2},
    Tile{16, 32, 1, 1, 8, 2},
    Tile{16, 128, 1, 2, 4, 2},
    Tile{16, 256, 1, 4, 2, 2},
    // Tens of tokens: activations are read once a row of blocks, and teams of several warps share them. Tiles with eight warps in
    // one-warp or two-warp teams need the shared memory of an A100 or H100 (164, 227 KB); the others fit in 99 KB.
    Tile{32, 64, 1, 1, 8, 1},
    Tile{32, 64, 1, 2, 4, 2},
    Tile{32, 128, 1, 2, 4, 1},
    Tile{32, 256, 1, 4, 2, 1},
    // From 64 tokens: 64 x 64 a warp is all that 255 registers hold (128 are accumulators). 128-token tiles were measured and lost
    // everywhere: two blocks or teams out of step keep the tensor cores busier than one large team in step.
    Tile{64, 64, 1, 2, 4, 1},
    Tile{64, 128, 1, 2, 4, 1},
    Tile{64, 128, 1, 4, 2, 1},
    Tile{64, 256, 1, 4, 2, 1},
    Tile{64, 256, 1, 4, 1, 2},
};

// Every number above must satisfy what the kernel assumes.
constexpr bool valid_tile(const Tile& t) {
  return t.block_m % (t.warps_m * kMmaTokens) == 0 && t.block_n % (t.warps_n * format::kSliceRows) == 0 &&
         (t.block_n % format::kTileRows == 0 || format::kTileRows % t.block_n == 0) && t.threads() <= 1024 &&
         t.threads() * t.min_blocks <= 2048;
}
constexpr bool valid_tiles() {
  for (const Tile& t : kTiles)
    if (!valid_tile(t)) return false;
  return true;
}
static_assert(valid_tiles());

}  // namespace sparse_marlin
