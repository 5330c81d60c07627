// Stream-K: sums of an output tile whose column tiles are in the ranges of several blocks (plan/stream_k.h) meet in the workspace. The
// block with the tile's first column tiles adds those of the ranges that follow, in their order: the same bits in every run.
//
// That a range's sums are there is said by a flag that equals the launch's token, 64 random bits: whatever the memory held before,
// it did not hold that, so nothing has to be cleared first. Whoever has seen a flag clears it, because a CUDA graph launches again
// with the same token.
#pragma once
#include "device/mainloop_sm90.cuh"
#include "device/ptx/cp_async.cuh"
#include "device/ptx/flag.cuh"

namespace sparse_marlin::device {

template <typename Consumer, ShapeSm90 kTile>
struct RangesSm90 {
  using Sums = typename Consumer::Sums;
  static constexpr int kVectorSums = sizeof(float4) / sizeof(float);
  static constexpr int kPanelVectors = kTile.block_m / 2 / kVectorSums;  // of a thread

  const Consumer& consumer;

  __device__ __forceinline__ void sync() const {
    ptx::named_barrier(1 + consumer.warpgroup, kWarpgroupThreads);  // the epilogue's, which does not run meanwhile
  }
  __device__ __forceinline__ int place(int range) const { return range * kTile.consumers + consumer.warpgroup; }
  // This thread's first vector; the others follow at the distance of a warpgroup's.
  __device__ __forceinline__ float4* vectors(int range) const {
    return reinterpret_cast<float4*>(consumer.args.gemm.partials) +
           static_cast<int64_t>(place(range)) * (kTile.panels * kPanelVectors * kWarpgroupThreads) +
           threadIdx.x % kWarpgroupThreads;
  }

  // The block's own range is in the middle or at the end of the tile.
  __device__ __forceinline__ void give(const Sums& sums) const {
    float4* to = vectors(consumer.range());
#pragma unroll
    for (int b = 0; b < kTile.panels; ++b) {
#pragma unroll
      for (int i = 0; i < kPanelVectors; ++i) {
        const float* v = sums[b] + i * kVectorSums;
        to[(b * kPanelVectors + i) * kWarpgroupThreads] = make_float4(v[0], v[1], v[2], v[3]);
      }
    }
    sync();
    if (threadIdx.x % kWarpgroupThreads == 0)
      ptx::flag_raise(consumer.args.flags + place(consumer.range()), consumer.args.token);
  }

  // The block's range has the beginning of `tile`: adds all others.
  __device__ __forceinline__ void take(Sums& sums, int tile) const {
    const StreamK& stream = consumer.args.stream;
    const int end = (tile - stream.whole_tiles + 1) * consumer.cols();
    for (int range = consumer.range() + 1; stream.start(range) < end; ++range) {
      if (threadIdx.x % kWarpgroupThreads == 0) {
        ptx::flag_wait(consumer.args.flags + place(range), consumer.args.token);
        ptx::flag_clear(consumer.args.flags + place(range));
      }
      sync();
      const float4* from = vectors(range);
#pragma unroll
      for (int b = 0; b < kTile.panels; ++b) {
#pragma unroll
        for (int i = 0; i < kPanelVectors; ++i) {
          const float4 v = __ldcg(from + (b * kPanelVectors + i) * kWarpgroupThreads);
          float* to = sums[b] + i * kVectorSums;
          to[0] += v.x;
          to[1] += v.y;
          to[2] += v.z;
          to[3] += v.w;
        }
      }
    }
  }
};

}  // namespace sparse_marlin::device
