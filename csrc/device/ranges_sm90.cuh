// Stream-K: sums of an output tile whose column tiles are in the ranges of several blocks (plan/stream_k.h) meet in the workspace. The
// block with the tile's first column tiles adds those of the ranges that follow, in their order: the same bits in every run. They
// come through its ring of stages behind the tile's last column tile, a panel's sums in the bytes of a stage's activations.
//
// That a range's sums are there is said by a flag that equals the launch's token, 64 random bits: whatever the memory held before,
// it did not hold that, so nothing has to be cleared first. Whoever has seen a flag clears it, because a CUDA graph launches again
// with the same token.
#pragma once
#include "device/mainloop_sm90.cuh"
#include "device/ptx/cp_async.cuh"

namespace sparse_marlin::device {

template <typename Consumer, ShapeSm90 kTile>
struct RangesSm90 {
  using Sums = typename Consumer::Sums;
  using Place = typename Consumer::Place;
  static constexpr int kVectorSums = sizeof(float4) / sizeof(float);
  static constexpr int kPanelVectors = kTile.block_m / 2 / kVectorSums;  // of a thread
  static constexpr int kVectorBytes = kWarpgroupThreads * sizeof(float4);

  // Where a warpgroup tells the warp that raises its flag: after the epilogues' barriers.
  static constexpr int kFirstBarrier = 1 + kTile.consumers;
  static constexpr int kBarrierThreads = kWarpgroupThreads + format::kLanes;

  const Consumer& consumer;

  // The block's own range is in the middle or at the end of the tile.
  __device__ __forceinline__ void give(const Sums& sums) const {
    const int range = consumer.range();
#pragma unroll
    for (int b = 0; b < kTile.panels; ++b) {
      float4* to = reinterpret_cast<float4*>(consumer.range_sums(range, consumer.warpgroup * kTile.panels + b)) +
                   threadIdx.x % kWarpgroupThreads;
#pragma unroll
      for (int i = 0; i < kPanelVectors; ++i) {
        const float* v = sums[b] + i * kVectorSums;
        to[i * kWarpgroupThreads] = make_float4(v[0], v[1], v[2], v[3]);
      }
    }
    ptx::named_barrier_arrive(kFirstBarrier + consumer.warpgroup, kBarrierThreads);
  }
  // All threads of a warp of the producer: a flag waits until what was written before it has arrived, more than a microsecond.
  template <typename Pipeline>
  static __device__ __forceinline__ void raise_flags(const Pipeline& pipeline) {
    const int tile = pipeline.first_of_range();
    if (tile == pipeline.tiles() || !pipeline.continues(tile)) return;
#pragma unroll 1
    for (int warpgroup = 0; warpgroup < kTile.team_size(); ++warpgroup) {
      ptx::named_barrier(kFirstBarrier + warpgroup, kBarrierThreads);
      if (ptx::elect_one()) ptx::flag_raise(pipeline.range_flag(pipeline.range(), warpgroup), pipeline.args.token);
    }
  }

  // The block's range has the beginning of `tile`: adds all others' sums, which are in the next stages. Nothing comes after them, so
  // where they end need not be known: a `place` that went through these branches would cost the main loop its uniform registers.
  __device__ __forceinline__ void take(Sums& sums, int tile, Place place) const {
    consumer.for_each_later_range(tile, [&](int) {
      for (int owner = 0; owner < kTile.team_size(); ++owner) {
#pragma unroll
        for (int b = 0; b < kTile.panels; ++b) {
          ptx::mbarrier_wait(consumer.full(place.stage), place.parity);
          uint32_t loaded = 0;
          if (owner == consumer.warpgroup) {
            loaded = add(sums[b],
                         consumer.acts_at(place.stage) + threadIdx.x % kWarpgroupThreads * uint32_t{sizeof(float4)});
            __syncwarp();
          }
          consumer.release(place.stage, loaded & consumer.args.zero);  // not before the loads have returned
          place = place.next();
        }
      }
    });
  }

  // Returns bits that depend on all loads.
  static __device__ __forceinline__ uint32_t add(float (&sums)[kTile.block_m / 2], uint32_t from) {
    uint32_t loaded = 0;
#pragma unroll
    for (int i = 0; i < kPanelVectors; ++i) {
      const uint4 v = ptx::load_shared_v4(from + i * kVectorBytes);
      float* to = sums + i * kVectorSums;
      to[0] += __uint_as_float(v.x);
      to[1] += __uint_as_float(v.y);
      to[2] += __uint_as_float(v.z);
      to[3] += __uint_as_float(v.w);
      loaded |= v.x;
    }
    return loaded;
  }
};

}  // namespace sparse_marlin::device
