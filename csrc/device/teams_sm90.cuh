// Two teams of consumers, each with every other column tile: they give each other sums through shared memory, so that either has all of
// the chunks that it finishes. A block of teams has one output tile, so this happens once. Barriers in shared memory say that they are there, not
// named ones: behind those synccheck saw divergence (inferred: because warps end right behind it).
#pragma once
#include "device/exchange_sm90.cuh"
#include "device/ptx/global.cuh"

namespace sparse_marlin::device {

template <typename Consumer, ShapeSm90 kTile>
struct TeamsSm90 {
  using Exchange = ExchangeSm90<Consumer, kTile>;
  using Sums = typename Consumer::Sums;
  static_assert(kTile.teams == 2 && kTile.panels == 1);

  const Consumer& consumer;

  // Afterwards the team's chunks are the sums of both.
  template <int kTeam>
  __device__ __forceinline__ void meet(Sums& sums, int splits) const {
    const uint32_t place = consumer.smem + Consumer::kSmem.team_sums +
                           consumer.warpgroup * Exchange::kChunks * kChunkBytes +
                           threadIdx.x % kWarpgroupThreads * uint32_t{sizeof(float4)};
    const auto at = [&](int chunk, int vector) {
      return place + chunk * kChunkBytes + vector * Exchange::kVectorBytes;
    };
    Exchange::for_each_chunk(splits, [&](int c, int, int i) {
      if (Exchange::has(kTeam, i)) return;
#pragma unroll
      for (int v = 0; v < Exchange::kVectors; ++v) {
        const float4 of = Exchange::vector(sums, c, v);
        ptx::store_shared_v4(
            at(c, v), {__float_as_uint(of.x), __float_as_uint(of.y), __float_as_uint(of.z), __float_as_uint(of.w)});
      }
    });
    ptx::mbarrier_arrive(consumer.team_full(1 - kTeam, consumer.warpgroup));
    ptx::mbarrier_wait(consumer.team_full(kTeam, consumer.warpgroup), 0);
    Exchange::for_each_chunk(splits, [&](int c, int, int i) {
      if (!Exchange::has(kTeam, i)) return;
#pragma unroll
      for (int v = 0; v < Exchange::kVectors; ++v) {
        const uint4 of = ptx::load_shared_v4(at(c, v));
        float* to = sums[0] + c * kChunkSums + v * Exchange::kVectorSums;
        to[0] += __uint_as_float(of.x);
        to[1] += __uint_as_float(of.y);
        to[2] += __uint_as_float(of.z);
        to[3] += __uint_as_float(of.w);
      }
    });
  }
};

}  // namespace sparse_marlin::device
