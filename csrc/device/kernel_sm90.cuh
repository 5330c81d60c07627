// The Hopper kernel (wgmma.sp, compute capability 9.0) as an outline: roles, pipeline, epilogue. Persistent: a cluster of blocks
// walks over output tiles until none is left; where k is split over the cluster or over teams of
// consumers, it does one.
#pragma once
#include "device/epilogue_sm90.cuh"
#include "device/exchange_sm90.cuh"
#include "device/mainloop_sm90.cuh"
#include "device/producer_sm90.cuh"
#include "device/ranges_sm90.cuh"
#include "device/teams_sm90.cuh"

namespace sparse_marlin::device {

// What follows the main loop where k is split, over teams or a cluster.
template <ShapeSm90 kTile, int kTeam, typename Consumer, typename End>
__device__ __forceinline__ void exchange_and_store(const Consumer& consumer, const End& end,
                                                   typename Consumer::Sums& sums, const BlockWork& work) {
  const int splits = consumer.args.start.order.splits;
  if (splits > 1) ptx::cluster_arrive();  // this thread no longer reads its stages
  if constexpr (kTile.teams > 1) TeamsSm90<Consumer, kTile>{consumer}.template meet<kTeam>(sums, splits);
  const auto exchange = ExchangeSm90<Consumer, kTile>::of(consumer, splits);
  if (splits > 1) {
    ptx::cluster_wait();  // nor does anybody else
    exchange.template send<kTeam>(sums);
  }
  end.template store_owned<kTeam>(exchange, sums, work, consumer.first_feature(work));
}

// The shape goes by its index in kShapesSm90, as in kernel_sm80.cuh.
template <typename Act, int kBits, int kShapeIndex, ScaleMode kMode>
__global__ void __launch_bounds__(kShapesSm90[kShapeIndex].threads(), kShapesSm90[kShapeIndex].blocks())
    gemm_sm90(const __grid_constant__ KernelArgsSm90 args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr ShapeSm90 kTile = kShapesSm90[kShapeIndex];
  using Producer = ProducerSm90<Act, kBits, kTile, kMode>;
  using Consumer = ConsumerSm90<Act, kBits, kTile, kMode>;
  using Pipeline = PipelineSm90<Act, kBits, kTile, kMode>;
  using End = EpilogueSm90<Act, Consumer, kTile>;
  extern __shared__ __align__(kSwizzleAlign) uint8_t shared[];
  const uint32_t smem = ptx::smem_address(shared);
  const int splits = args.start.order.splits;
  const Pipeline pipeline{args, smem};
  const int warpgroup = threadIdx.x / kWarpgroupThreads;
  const bool shares = args.start.share > 1;  // then the others' barriers must be ready before anything is copied

  const int warp_of_block = __shfl_sync(~0u, threadIdx.x / format::kLanes, 0);
  if (ptx::elect_one()) {
    pipeline.init_barriers(warp_of_block);
    if (warp_of_block == kTile.consumers * format::kTileSlices) Producer{pipeline}.prefetch_maps();
  }
  if (shares) {
    ptx::cluster_meet();
  } else {
    __syncthreads();
  }

  if (warpgroup == kTile.consumers) {
    ptx::registers_release<kTile.producer_registers()>();
    const int warp = __shfl_sync(~0u, threadIdx.x / format::kLanes % format::kTileSlices, 0);
    if (warp == Producer::kIdle) {
      RangesSm90<Consumer, kTile>::raise_flags(pipeline);
    } else if (ptx::elect_one()) {
      Producer{pipeline}.run(warp);
    }
    __syncwarp();
    if constexpr (kTile.may_split()) {
      if (splits > 1) ptx::cluster_arrive();  // before the consumers' exchange
    }
  } else {
    ptx::registers_acquire<kTile.consumer_registers()>();
    // the same in all lanes of a warp, which the compiler learns from the shuffle
    const int team = kTile.teams > 1 ? __shfl_sync(~0u, warpgroup / kTile.team_size(), 0) : 0;
    const int member = warpgroup - team * kTile.team_size();
    const Consumer consumer{pipeline, Consumer::lane_place(pipeline, member), member};
    const End end{args, smem + Pipeline::kSmem.staging + member * Pipeline::kSmem.staging_bytes, warpgroup};
    end.fetch_arguments();
    ptx::grid_dependency_wait();  // the output may still be in use by the kernel before
    typename Consumer::Sums sums;
    typename Consumer::Weights weights = {};
    typename Pipeline::Place place{0, 0};
    for (int tile = pipeline.first_tile(); tile < pipeline.tiles(); tile = pipeline.next_tile(tile)) {
      const BlockWork work = pipeline.work(tile);
      // Teams have code of their own to the end, or their sums would have to lie in the same registers.
      if constexpr (kTile.teams > 1) {
        if (team > 0) {
          consumer.template run<1>(sums, weights, work, place);
          exchange_and_store<kTile, 1>(consumer, end, sums, work);
        } else {
          consumer.template run<0>(sums, weights, work, place);
          exchange_and_store<kTile, 0>(consumer, end, sums, work);
        }
        continue;
      }
      consumer.template run<0>(sums, weights, work, place);
      if constexpr (kTile.may_split()) {
        if (splits > 1) {
          exchange_and_store<kTile, 0>(consumer, end, sums, work);
          continue;
        }
      }
      const RangesSm90<Consumer, kTile> ranges{consumer};
      if (pipeline.continues(tile)) {
        ranges.give(sums);
        continue;
      }
      if (pipeline.begins(tile)) ranges.take(sums, tile, place);
      end.store(sums, work, consumer.first_feature(work));
    }
    end.finish();
  }
  if (shares) ptx::cluster_meet();  // shared memory must outlive the other block's arrivals and copies
#endif
}

}  // namespace sparse_marlin::device
