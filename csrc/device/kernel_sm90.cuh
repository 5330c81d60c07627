// The Hopper kernel (wgmma.sp, compute capability 9.0) as an outline: roles, pipeline, epilogue. Persistent: a cluster of blocks
// walks over output tiles (and splits of k) until none is left.
#pragma once
#include "device/epilogue_sm90.cuh"
#include "device/mainloop_sm90.cuh"

namespace sparse_marlin::device {

// The tile goes by its index in kTilesSm90, as in kernel_sm80.cuh.
template <typename Act, int kBits, int kTileIndex, ScaleMode kMode>
__global__ void __launch_bounds__(kTilesSm90[kTileIndex].threads(), 1)
    gemm_sm90(const __grid_constant__ KernelArgsSm90 args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr TileSm90 kTile = kTilesSm90[kTileIndex];
  using Producer = ProducerSm90<Act, kBits, kTile, kMode>;
  using Consumer = ConsumerSm90<Act, kBits, kTile, kMode>;
  using Pipeline = PipelineSm90<Act, kBits, kTile, kMode>;
  using End = EpilogueSm90<Act, Consumer, kTile>;
  extern __shared__ uint8_t shared[];
  const uint32_t smem = (ptx::smem_address(shared) + kSwizzleAlign - 1) & ~uint32_t{kSwizzleAlign - 1};
  const Pipeline pipeline{args, smem, kTile.cluster > 1 ? static_cast<int>(ptx::cluster_block()) : 0};
  const int warpgroup = threadIdx.x / kWarpgroupThreads;

  if (threadIdx.x == 0) pipeline.init_barriers();
  if constexpr (kTile.cluster > 1) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }

  if (warpgroup == kTile.consumers) {
    ptx::registers_release<kTile.producer_registers()>();
    if (threadIdx.x == kTile.consumers * kWarpgroupThreads) Producer{pipeline}.run();
    __syncwarp();
  } else {
    ptx::registers_acquire<kTile.consumer_registers()>();
    const Consumer consumer{pipeline, Consumer::lane_place(warpgroup), warpgroup};
    const End end{args, smem + Pipeline::kSmem.staging + warpgroup * Pipeline::kSmem.staging_bytes, warpgroup};
    ptx::grid_dependency_wait();  // output and workspace may still be in use by the kernel before
    typename Consumer::Sums sums;
    typename Consumer::Weights weights = {};
    typename Pipeline::Place place{0, 0};
    for (int item = pipeline.first_item(); item < pipeline.items(); item += pipeline.item_step()) {
      const BlockWork work = pipeline.work(item);
      consumer.run(sums, weights, work, place);
      end.store(sums, work, pipeline.feature0(work) + warpgroup * Consumer::kPanels * format::kTileRows);
    }
    if (threadIdx.x % kWarpgroupThreads == 0) ptx::bulk_wait_read();  // the staging bytes must live until they are read
  }
  // shared memory must outlive the other block's arrivals and copies
  if constexpr (kTile.cluster > 1) ptx::cluster_sync();
#endif
}

}  // namespace sparse_marlin::device
