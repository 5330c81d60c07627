// Two teams of consumers, each with every other column tile: the second one's sums go to the first through shared memory. A block of teams
// has one output tile, so this happens once. A barrier in shared memory says that they are there, not a named one: behind that synccheck saw
// divergence (inferred: because warps end right behind it).
#pragma once
#include "device/mainloop_sm90.cuh"
#include "device/ptx/global.cuh"

namespace sparse_marlin::device {

template <typename Consumer, ShapeSm90 kTile>
struct TeamsSm90 {
  using Sums = typename Consumer::Sums;
  static_assert(kTile.teams == 2 && kTile.panels == 1);
  static constexpr int kVectorSums = sizeof(float4) / sizeof(float);
  static constexpr int kVectors = kTile.block_m / 2 / kVectorSums;  // of a thread
  static constexpr int kVectorBytes = kWarpgroupThreads * sizeof(float4);

  const Consumer& consumer;

  __device__ __forceinline__ void give(const Sums& sums) const {
    const uint32_t to = place();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float* v = sums[0] + i * kVectorSums;
      ptx::store_shared_v4(to + i * kVectorBytes, {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                                                   __float_as_uint(v[3])});
    }
    ptx::mbarrier_arrive(consumer.team_full(consumer.warpgroup));
  }
  __device__ __forceinline__ void take(Sums& sums) const {
    ptx::mbarrier_wait(consumer.team_full(consumer.warpgroup), 0);
    const uint32_t from = place();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint4 v = ptx::load_shared_v4(from + i * kVectorBytes);
      float* to = sums[0] + i * kVectorSums;
      to[0] += __uint_as_float(v.x);
      to[1] += __uint_as_float(v.y);
      to[2] += __uint_as_float(v.z);
      to[3] += __uint_as_float(v.w);
    }
  }

 private:
  // Of this thread's first vector.
  __device__ __forceinline__ uint32_t place() const {
    return consumer.smem + Consumer::kSmem.team_sums + consumer.warpgroup * kVectors * kVectorBytes +
           threadIdx.x % kWarpgroupThreads * uint32_t{sizeof(float4)};
  }
};

}  // namespace sparse_marlin::device
