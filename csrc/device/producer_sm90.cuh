// The warpgroup of the Hopper kernel that keeps the ring of stages filled.
#pragma once
#include <type_traits>

#include "device/pipeline_sm90.cuh"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/cp_async.cuh"
#include "device/ptx/dependent_launch.cuh"
#include "device/ptx/flag.cuh"
#include "plan/low_rank.h"

namespace sparse_marlin::device {

// Threads that ask for everything, one tensor copy a stage each; what lies past the end of a tensor arrives as zeros. One thread for
// all three would be the bottleneck of tiles with few tokens: a copy takes it some 200 cycles to issue.
template <typename Act, int kBits, ShapeSm90 kTile, ScaleMode kMode>
struct ProducerSm90 : PipelineSm90<Act, kBits, kTile, kMode> {
  using Base = PipelineSm90<Act, kBits, kTile, kMode>;
  using Base::args;
  using Base::kSmem;
  using typename Base::Place;

  // A copy cannot start without its map, so they are asked for first of all. One thread's.
  __device__ __forceinline__ void prefetch_maps() const {
    ptx::prefetch_map(&args.weights_map);
    ptx::prefetch_map(args.start.order.tiles_m > 1 || args.whole_tiles > 0 ? &args.acts_map : &args.last_map);
    if (kMode != ScaleMode::kNone) ptx::prefetch_map(&args.scales_map);
    if (args.copies_out) ptx::prefetch_map(&args.out_map);
  }

  // Three threads, each of which asks for one thing. They find their way through the tiles by the same code, since it is fetched from
  // memory at the start of a launch; the loop over the columns of a tile is each one's own, since a copy takes it some 200 clocks.
  enum Role { kWeights, kActs, kScales, kIdle };

  __device__ __forceinline__ void run(int role) const {
    if (kMode == ScaleMode::kNone && role == kScales) return;
    Place place{0, 1};  // a fresh barrier counts as passed: the first round does not wait
#pragma unroll 1
    for (int tile = this->first_tile(); tile < this->tiles(); tile = this->next_tile(tile)) {
      const BlockWork work = this->work(tile);
      if (role == kWeights) {
        ask_weights(work, place);
      } else if (role == kActs) {
        ask_acts(work, place);
      } else {
        ask_scales(work, place);
      }
      if (!this->begins(tile)) continue;
      this->for_each_later_range(tile, [&](int range) {
#pragma unroll 1
        for (int panel = 0; panel < kTile.row_tiles(); ++panel) {
          ptx::mbarrier_wait(this->empty(place.stage), place.parity);
          if (role == kActs) {
            ask_sums(range, panel, place.stage);
          } else {
            ptx::mbarrier_arrive(this->full(place.stage));
          }
          place = place.next();
        }
      });
    }
  }

  // Column tiles of the weight, and behind them those of a correction's packed factor, which are copied by other maps.
  using Own = std::false_type;
  using Tail = std::true_type;
  // Calls ask(Own or Tail, column tile of it, stage, barrier) for each column tile of the work, when the stage is free.
  template <typename Ask>
  __device__ __forceinline__ void for_each_col(const BlockWork& work, Place& place, const Ask& ask) const {
    int col = work.first_col;
    const auto next = [&](auto which, int tile) {
      ptx::mbarrier_wait(this->empty(place.stage), place.parity);
      ask(which, tile, place.stage, this->full(place.stage));
      place = place.next();
    };
#pragma unroll 1
    for (; col < min(work.last_col, args.own_cols); ++col) next(Own{}, col);
#pragma unroll 1
    for (; col < work.last_col; ++col) next(Tail{}, col - args.own_cols);
  }
  __device__ __forceinline__ void ask_weights(const BlockWork& work, Place& place) const {
    const int row_tile = this->feature0(work) / format::kTileRows;
    const uint64_t policy = args.weights_policy;
    for_each_col(work, place, [&](auto tail, int col, int stage, uint32_t barrier) {
      ptx::mbarrier_arrive_expect(barrier, kTile.row_tiles() * kSmem.tile_bytes);
      ptx::tensor_load_3d(this->weights_at(stage), tail() ? &args.tail_weights_map : &args.weights_map, 0,
                          col * (kSmem.tile_bytes / kMapRowBytes), row_tile, barrier, policy);
    });
  }
  // Weights depend on no kernel before this one. Scales may be an aligned copy that it made. Both waits below come behind what can be worked
  // out before; they are every tile's, but only the first one's takes time.
  __device__ __forceinline__ void ask_scales(const BlockWork& work, Place& place) const {
    int feature = this->feature0(work);
    asm volatile("" : "+r"(feature));
    ptx::grid_dependency_wait();
    for_each_col(work, place, [&](auto tail, int col, int stage, uint32_t barrier) {
      ptx::mbarrier_arrive_expect(barrier, args.scales_bytes);
      ptx::tensor_load(this->weights_at(stage) + Base::kScalesOffset, tail() ? &args.tail_scales_map : &args.scales_map,
                       feature, col * format::kTileCols >> args.gemm.group_shift, barrier);
    });
  }
  // Blocks that share their activations bring each other one half of the columns each.
  __device__ __forceinline__ void ask_acts(const BlockWork& work, Place& place) const {
    static_assert(kMaxShare == kHalves);
    constexpr int kHalfBytes = kTile.block_m * kSwizzleRowBytes;
    constexpr uint16_t kBlocks = (1 << kMaxShare) - 1;
    int token = work.tile_m * kTile.block_m;
    const int own_half = this->share_rank();
    const bool last = work.tile_m == args.start.order.tiles_m - 1, whole = work.tile_m < args.whole_tiles;
    asm volatile("" : "+r"(token));
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    if (whole) {
      ask_whole_acts(work, place, token, last);
      return;
    }
    const CUtensorMap* const own_map = last ? &args.last_map : &args.acts_map;
    const uint32_t bytes = last ? kHalves * kSwizzleRowBytes * args.last_tokens : kSmem.acts_bytes;
    for_each_col(work, place, [&](auto tail, int col, int stage, uint32_t barrier) {
      // both halves of a column tile of the correction multiply the same ranks
      constexpr int kHalfStep = tail() ? 0 : kHalfCols;
      const CUtensorMap* map = own_map;
      if (tail()) map = last ? &args.tail_last_map : &args.tail_acts_map;
      const uint32_t to = this->acts_at(stage);
      const int column = col * (tail() ? kTailRanks : format::kTileCols);
      ptx::mbarrier_arrive_expect(barrier, bytes);
      if (args.start.share > 1) {
        ptx::tensor_load_multicast(to + own_half * kHalfBytes, map, column + own_half * kHalfStep, token, barrier,
                                   kBlocks);
      } else {
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
          ptx::tensor_load(to + half * kHalfBytes, map, column + half * kHalfStep, token, barrier);
      }
    });
  }
  // The same by one copy a stage: two take a thread 400 clocks to ask for (docs/KERNEL_SM90.md, attempts 6 and 127).
  __device__ __forceinline__ void ask_whole_acts(const BlockWork& work, Place& place, int token, bool last) const {
    for_each_col(work, place, [&](auto tail, int col, int stage, uint32_t barrier) {
      const uint32_t to = this->acts_at(stage);
      ptx::mbarrier_arrive_expect(barrier, kSmem.acts_bytes);
      if (!tail()) {
        ptx::tensor_load_3d(to, &args.acts_map, 0, token, col * kHalves, barrier);
        return;
      }
      const CUtensorMap* const map = last ? &args.tail_last_map : &args.tail_acts_map;
#pragma unroll
      for (int half = 0; half < kHalves; ++half)  // both multiply the same ranks
        ptx::tensor_load(to + half * (kTile.block_m * kSwizzleRowBytes), map, col * kTailRanks, token, barrier);
    });
  }
  // The sums of a panel of another block's range, into the bytes of a stage's activations.
  __device__ __forceinline__ void ask_sums(int range, int panel, int stage) const {
    if (panel % kTile.panels == 0) {
      uint64_t* const flag = this->range_flag(range, panel / kTile.panels);
      ptx::flag_wait(flag, args.token);
      ptx::flag_clear(flag);
      ptx::fence_async_global();
    }
    ptx::mbarrier_arrive_expect(this->full(stage), kSmem.acts_bytes);
    ptx::bulk_load(this->acts_at(stage), this->range_sums(range, panel), kSmem.acts_bytes, this->full(stage));
  }
};

}  // namespace sparse_marlin::device
