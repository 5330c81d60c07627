// The tiles of the Hopper kernel (wgmma.sp, compute capability 9.0): the only list of them. Plans number the tiles of all kernels
// through: first those of plan/tiles.h, then these (plan/tiles_all.h).
//
// A block is one producer and `consumers` warpgroups; each of them computes `panels` panels of 64 features x block_m tokens. Many
// features and few tokens: wgmma.sp reads its activations at the full rate of shared memory, so whatever else touches shared memory
// costs time, and more features share one copy of the activations. A cluster is share x splits blocks: `share` blocks along features
// bring each other their activations, `splits` blocks along k add their sums through distributed shared memory.
#pragma once
#include <array>

#include "format/packed_24.h"
#include "plan/registers.h"
#include "plan/tiles.h"

namespace sparse_marlin {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kMaxShare = 2;
inline constexpr int kMaxCluster = 8;

struct ShapeSm90 {
  int block_m;
  int consumers;
  int panels;
  int teams = 1;  // of consumers, which take the column tiles in turn and add their sums at the end

  constexpr int team_size() const { return consumers / teams; }
  constexpr int row_tiles() const { return team_size() * panels; }  // 64-row tiles of the packed weight
  constexpr int block_n() const { return row_tiles() * format::kTileRows; }
  constexpr int threads() const { return (consumers + 1) * kWarpgroupThreads; }
  // The largest tile is for many tokens, where nothing has to be split, and its sums leave no registers to exchange them.
  constexpr bool may_split() const { return block_m * panels <= 256; }
  // Blocks that an SM holds at once. Two of the small ones: the next launch can then start before this one has finished.
  constexpr int blocks() const { return consumers == 2 && panels == 1 && block_m <= 64 ? 2 : 1; }
  // Of a thread, at launch. The producer hands registers to the consumers: together they have as many as the block was launched with.
  constexpr int launch_registers() const {
    return kSchedulers * kSchedulerRegisters / (blocks() * threads()) / kRegisterUnit * kRegisterUnit;
  }
  constexpr int producer_registers() const {
    return blocks() == 2 || consumers > 2 ? 32 : block_m * panels > 256 ? 24 : 40;
  }
  constexpr int consumer_registers() const {
    return ((consumers + 1) * launch_registers() - producer_registers()) / consumers / kRegisterUnit * kRegisterUnit;
  }
};

// With few tokens four consumers hide each other's latency; with many, two keep more sums in registers. Where there are few features, too,
// the four are two teams, which share out k. Three are for numbers of features that are shared out more evenly by 192.
inline constexpr std::array kShapesSm90{
    ShapeSm90{16, 4, 1},    ShapeSm90{32, 2, 1},    ShapeSm90{32, 4, 1},    ShapeSm90{48, 2, 1},  ShapeSm90{64, 2, 1},
    ShapeSm90{64, 4, 1},    ShapeSm90{96, 2, 1},    ShapeSm90{96, 2, 2},    ShapeSm90{128, 2, 1}, ShapeSm90{128, 2, 2},
    ShapeSm90{160, 2, 2},   ShapeSm90{176, 2, 2},                            //
    ShapeSm90{32, 4, 1, 2}, ShapeSm90{48, 4, 1, 2}, ShapeSm90{64, 4, 1, 2},  //
    ShapeSm90{64, 3, 1},    ShapeSm90{96, 3, 1},    ShapeSm90{128, 3, 1},   ShapeSm90{176, 3, 1}, ShapeSm90{192, 3, 1},
};

constexpr bool valid_shape(const ShapeSm90& t) {
  return t.block_m % 16 == 0 && t.block_m <= 256 && t.block_n() <= 256 && t.threads() <= 1024;
}
constexpr bool valid_shapes() {
  for (const ShapeSm90& t : kShapesSm90)
    if (!valid_shape(t)) return false;
  return true;
}
static_assert(valid_shapes());

struct TileSm90 {
  int shape;  // index into kShapesSm90: the compiled kernel
  int share;  // 1 .. kMaxShare

  constexpr const ShapeSm90& size() const { return kShapesSm90[shape]; }
};

}  // namespace sparse_marlin
