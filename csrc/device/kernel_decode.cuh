// The decode kernel (mma.sp fed by bulk copies, compute capability 9.0) as an outline. Persistent: a block walks over output tiles; where
// k is split over a cluster, this does one.
#pragma once
#include "device/epilogue_decode.cuh"
#include "device/low_rank_decode.cuh"
#include "device/mainloop_decode.cuh"
#include "plan/registers.h"

namespace sparse_marlin::device {

// Registers of a thread, at most. No launch bounds, since a launch may bring idle warps (launch/spread.h).
constexpr int max_registers(const TileDecode& t, int num_bits, ScaleMode mode, bool low_rank) {
  const int warps =
      (blocks_decode(t, num_bits, mode, low_rank) * t.threads() / format::kLanes + kSchedulers - 1) / kSchedulers;
  return kSchedulerRegisters / format::kLanes / warps / kRegisterUnit * kRegisterUnit;
}

// The tile goes by its index in kTilesDecode, as in kernel_sm80.cuh.
// kLowRank: with a low-rank correction; a kernel of its own, so that the others keep their registers.
template <typename Act, int kBits, int kTileIndex, ScaleMode kMode, bool kLowRank>
__global__ void __maxnreg__(max_registers(kTilesDecode[kTileIndex], kBits, kMode, kLowRank))
    gemm_decode(const __grid_constant__ KernelArgsDecode args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr TileDecode kTile = kTilesDecode[kTileIndex];
  using Loader = DecodeLoader<kTile, kMode, kLowRank>;
  using Warp = DecodeWarp<Act, kBits, kTile, kMode, kLowRank>;
  using End = DecodeEpilogue<Act, Warp, kTile, kMode, kLowRank>;
  constexpr int kThreads = kTile.threads();
  // Barriers, besides the epilogue's, 1. All of shared memory's are ready for the warps that compute; for the one that loads; all warps
  // have ended.
  constexpr int kStart = 2, kReady = 3, kEnd = 4;
  extern __shared__ uint8_t shared[];
  const uint32_t unaligned = ptx::smem_address(shared);
  const uint32_t smem = (unaligned + kSwizzleAlign - 1) & ~uint32_t{kSwizzleAlign - 1};
  if constexpr (kLowRank) {
    const int index = static_cast<int>(blockIdx.x) - args.low.first_project_block;
    if (index >= 0 && index < args.low.project_blocks) {
      LowRankProject<Act, kTile>::run(args, index, shared);
      return;
    }
  }
  // the same in all lanes of a warp, which the compiler learns from the shuffle
  const int warp = __shfl_sync(~0u, threadIdx.x / format::kLanes, 0), lane = threadIdx.x % format::kLanes;

  const bool idle_warps = !kLowRank && blockDim.x > kThreads;
  if (idle_warps && warp > kTile.warps()) {  // keeps its registers to the end
    if (args.start.splits > 1) ptx::cluster_arrive();
    ptx::named_barrier(kEnd, blockDim.x);
    return;
  }

  const bool loads = warp == kTile.warps();
  const bool asks = loads && ptx::elect_one();
  const Loader loader{{args, smem}};
  const Warp mine{{args, smem},
                  lane,
                  warp % kTile.warps_n,
                  warp / kTile.warps_n,
                  smem + args.start.ring + warp * args.start.stages * Warp::kStageBytes,
                  smem + args.start.weights_full + warp * args.start.stages * kBarrierBytes};
  typename Loader::State asked;
  typename Warp::State state;
  typename Warp::Places places;
  if (loads) {
    if (asks) ptx::prefetch_map(&args.acts_map);
    if (asks && Loader::kScaled) ptx::prefetch_map(&args.scales_map);
    if (asks && kLowRank) ptx::prefetch_map(&args.up_map);
    if constexpr (kLowRank) {
      const LowRankPlaces<kTile, kMode> low{{args, smem}};
      if (asks) low.ask_down();
      if (asks && low.corrects()) low.begin();
    }
    if (asks) asked = loader.prepare();
    if (asks && args.gemm.splits > 1) loader.expect_sums();
    __syncwarp();
    ptx::named_barrier_arrive(kStart, kThreads);
    if (asks) loader.begin(asked);
    __syncwarp();
    ptx::named_barrier(kReady, kThreads);
  } else {
    state = {mine.start(), mine.first_stage(), mine.first_chunk()};
    ptx::named_barrier_arrive(kReady, kThreads);
    places = mine.places();
    ptx::named_barrier(kStart, kThreads);
    mine.go_on(state.stream);
    mine.let_next_start(state.stream);
  }
  if (args.gemm.splits > 1) ptx::cluster_arrive();
  if (loads) {
    if constexpr (kLowRank) {
      if (LowRankPlaces<kTile, kMode>::corrects()) {
        const LowRankReceiver<Act, kTile, kMode> receiver{{{args, smem}}};
        const int before = receiver.run(loader, asked, asks, lane);
        __syncwarp();
        if (asks) loader.run(asked);
        if (asks) loader.ask_next();
        __syncwarp();
        LowRankCount{args.low}.clear_if_last(before, lane);
        return;
      }
    }
    if (asks) loader.run(asked);
    if (asks) loader.ask_next();
    __syncwarp();
    if (idle_warps) ptx::named_barrier_arrive(kEnd, blockDim.x);
    return;
  }
  ptx::grid_dependency_wait();  // the output may still be in use by the kernel before
  const End end{args, mine};
  typename Warp::Sums sums;
  for (int tile = mine.first_tile(); tile < args.start.tiles; tile += mine.step()) {
    const uint2 scales = end.fetch_scales(mine.work(tile));
    typename End::Way way;
    if (End::kWayAhead) way = end.way(mine.work(tile));
    mine.run(sums, state, places);
    if constexpr (kLowRank)
      LowRankExpand<Act, Warp, kTile, kMode>{{{args, smem}}}.add(sums, mine, mine.work(tile), tile / mine.step());
    if (!End::kWayAhead) way = end.way(mine.work(tile));
    end.run(sums, way, tile, scales);
  }
  if (idle_warps) ptx::named_barrier_arrive(kEnd, blockDim.x);
#endif
}

}  // namespace sparse_marlin::device
