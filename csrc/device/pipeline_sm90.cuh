// What the producer and the consumers of a block of the Hopper kernel both know: the ring of stages, its barriers, where things lie, and
// which output tiles the block works on.
//
// A stage is one 128-column tile: acts [half][token][64 columns], row tiles of packed weights as they lie in memory, scales.
#pragma once
#include "device/kernel_args_sm90.cuh"
#include "device/ptx/hopper.cuh"
#include "device/ptx/mbarrier.cuh"
#include "device/scheduler.cuh"
#include "plan/smem_sm90.h"

namespace sparse_marlin::device {

// The next stage of the ring and the parity of its phase.
template <int kStages>
struct RingPlace {
  int stage;
  uint32_t parity;
  // kStep stages on; the stage so many before. By equality, for one at a time, the main loop is 2 to 6 instructions shorter.
  template <int kStep = 1>
  __device__ __forceinline__ RingPlace next() const {
    static_assert(kStep <= kStages);
    const bool wrap = kStep == 1 ? stage == kStages - 1 : stage + kStep >= kStages;
    return {wrap ? (kStep == 1 ? 0 : stage + kStep - kStages) : stage + kStep, wrap ? parity ^ 1 : parity};
  }
  template <int kStep>
  __device__ __forceinline__ int before() const {
    if constexpr (kStep == 1) return stage == 0 ? kStages - 1 : stage - 1;
    return stage < kStep ? stage + kStages - kStep : stage - kStep;
  }
};

// The blocks of a cluster are numbered along features first, then along k.
template <typename Act, int kBits, ShapeSm90 kTile, ScaleMode kMode>
struct PipelineSm90 {
  static constexpr SmemSm90 kSmem = smem_sm90(kTile, kBits, kMode);
  using Place = RingPlace<kSmem.stages>;

  const KernelArgsSm90& args;
  const uint32_t smem;  // 1024-byte aligned

  // Read again wherever they are needed: registers are short. share is 1 or 2.
  __device__ __forceinline__ int share_rank() const { return ptx::cluster_block() & (args.start.share - 1); }
  __device__ __forceinline__ int split() const { return ptx::cluster_block() >> (args.start.share - 1); }
  // The block at `share_rank` among those that share activations with this one, by its number in the cluster.
  __device__ __forceinline__ int sharer(int share_rank) const {
    return (ptx::cluster_block() & -args.start.share) + share_rank;
  }

  __device__ __forceinline__ uint32_t acts_at(int stage) const { return smem + stage * kSmem.acts_bytes; }
  __device__ __forceinline__ uint32_t weights_at(int stage) const {
    return smem + kSmem.weights + stage * kSmem.weights_bytes;
  }
  static constexpr int kScalesOffset = kTile.row_tiles() * kSmem.tile_bytes;  // in weights_at
  __device__ __forceinline__ uint32_t full(int stage) const { return smem + kSmem.full + stage * kBarrierBytes; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return smem + kSmem.empty + stage * kBarrierBytes; }

  __device__ __forceinline__ int tiles() const { return args.start.tiles; }
  __device__ __forceinline__ int cols() const { return args.start.order.cols; }

  // A block's share of the output: first whole tiles, then its range (plan/stream_k.h). What belongs to a tile is worked out again
  // from its number wherever it is needed: registers are short.
  __device__ __forceinline__ int first_tile() const {
    const int tile = ptx::cluster_id();
    if (kTile.teams > 1) return tile;
    return tile < args.start.stream.whole_tiles ? tile : first_of_range();
  }
  __device__ __forceinline__ int next_tile(int tile) const {
    if (kTile.teams > 1) return tiles();
    if (!in_range(tile)) {
      tile += ptx::num_clusters();
      return tile < args.start.stream.whole_tiles ? tile : first_of_range();
    }
    return range_col(tile + 1) < args.start.stream.start(range() + 1) ? tile + 1 : tiles();
  }
  // Blocks wait for those with the ranges after theirs: these must have been started before.
  __device__ __forceinline__ int range() const { return gridDim.x - 1 - blockIdx.x; }
  __device__ __forceinline__ bool in_range(int tile) const {
    return kTile.teams == 1 && tile >= args.start.stream.whole_tiles;
  }
  // The tile's first column tile, counted as ranges are.
  __device__ __forceinline__ int range_col(int tile) const { return (tile - args.start.stream.whole_tiles) * cols(); }
  __device__ __forceinline__ int first_of_range() const {
    if (args.start.stream.step == 0) return tiles();
    return args.start.stream.whole_tiles + args.cols.divide(args.start.stream.start(range()));
  }
  __device__ __forceinline__ BlockWork work(int tile) const {
    BlockWork w = args.start.order.work(tile, split());
    if (in_range(tile)) {
      w.first_col = max(0, args.start.stream.start(range()) - range_col(tile));
      w.last_col = min(w.last_col, args.start.stream.start(range() + 1) - range_col(tile));
    }
    return w;
  }
  // Whether the tile's first column tiles are in another block's range, and whether the last ones are but not those.
  __device__ __forceinline__ bool continues(int tile) const {
    return in_range(tile) && args.start.stream.start(range()) > range_col(tile);
  }
  __device__ __forceinline__ bool begins(int tile) const {
    return in_range(tile) && !continues(tile) && args.start.stream.start(range() + 1) < range_col(tile + 1);
  }
  // The ranges after the block's own that have column tiles of `tile`, too.
  template <typename Do>
  __device__ __forceinline__ void for_each_later_range(int tile, const Do& act) const {
    for (int range = this->range() + 1; args.start.stream.start(range) < range_col(tile + 1); ++range) act(range);
  }
  // In the workspace: the sums of a panel of a range, as many bytes as the activations of a stage, and whether they are there.
  __device__ __forceinline__ float* range_sums(int range, int panel) const {
    static_assert(kTile.block_m * format::kTileRows * sizeof(float) == kSmem.acts_bytes);
    return args.gemm.partials + (int64_t{range} * kTile.row_tiles() + panel) * (kTile.block_m * format::kTileRows);
  }
  __device__ __forceinline__ uint64_t* range_flag(int range, int warpgroup) const {
    return args.flags + range * kTile.team_size() + warpgroup;
  }
  __device__ __forceinline__ int feature0(const BlockWork& w) const {
    return (w.tile_n * args.start.share + share_rank()) * kTile.block_n();
  }

  __device__ __forceinline__ uint32_t received() const { return smem + kSmem.received; }
  // Of a consumer, by its number in its team.
  __device__ __forceinline__ uint32_t team_full(int team, int warpgroup) const {
    return smem + kSmem.team_full + (team * kTile.team_size() + warpgroup) * kBarrierBytes;
  }

  // A thread of each warp: making one ready takes 40 clocks, all of them by one warp would take longer than anything else at the start.
  __device__ __forceinline__ void init_barriers(int warp) const {
    static_assert(kSmem.stages <= kTile.threads() / format::kLanes);
    if (warp < kSmem.stages) {
      ptx::mbarrier_init(full(warp), kMode == ScaleMode::kNone ? 2 : 3);  // the producer's threads
      ptx::mbarrier_init(empty(warp), args.start.share * kTile.team_size() * (kWarpgroupThreads / format::kLanes));
    }
    if (kTile.may_split() && warp == 0 && args.start.order.splits > 1) {
      ptx::mbarrier_init(received(), 1);
      ptx::mbarrier_arrive_expect(received(), received_bytes(kTile, args.start.order.splits, split()));
    }
    if (kTile.teams > 1 && warp < kTile.consumers) ptx::mbarrier_init(team_full(0, warp), kWarpgroupThreads);
    ptx::mbarrier_init_fence();
  }
};

}  // namespace sparse_marlin::device
