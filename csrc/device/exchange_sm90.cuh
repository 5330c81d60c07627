// Where k is split over the blocks of a cluster: the sums of a tile meet in distributed shared memory. Chunk c (16 tokens x 64
// features of a consumer, 8 sums a thread) belongs to block c % splits, which gets every other block's sums of it and adds them to its own
// in the order of the splits from there on: the same result in every run. Teams share out a block's chunks.
#pragma once
#include "device/mainloop_sm90.cuh"

namespace sparse_marlin::device {

inline constexpr int kChunkSums = kChunkBytes / kWarpgroupThreads / static_cast<int>(sizeof(float));  // of a thread

template <typename Consumer, ShapeSm90 kTile>
struct ExchangeSm90 {
  static constexpr int kChunks = consumer_chunks(kTile);
  static constexpr int kPanelChunks = kChunks / kTile.panels;
  static constexpr int kVectorSums = sizeof(float4) / sizeof(float);
  static constexpr int kVectors = kChunkSums / kVectorSums;
  static constexpr int kVectorBytes = kChunkBytes / kVectors;  // of all threads
  using Sums = typename Consumer::Sums;

  // Calls act(chunk, the block that owns it, which of that block's it is) for all of a consumer's.
  template <typename Do>
  static __device__ __forceinline__ void for_each_chunk(int splits, const Do& act) {
    int owner = 0, i = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      act(c, owner, i);
      if (++owner == splits) {
        owner = 0;
        ++i;
      }
    }
  }
  // Whether a team finishes a block's i-th chunk.
  static __device__ __forceinline__ bool has(int team, int i) { return i % kTile.teams == team; }

  const Consumer& consumer;
  const int splits;
  const uint32_t consumer_bytes;  // of the chunks that a block owns, for one consumer and split
  const uint32_t own_place;       // of this thread, in the first chunk of the first split

  static __device__ __forceinline__ ExchangeSm90 of(const Consumer& consumer, int splits) {
    // owned_chunks(kTile, splits), whose division takes 40 instructions
    const uint32_t bytes = divide(kChunks + splits - 1, consumer.args.start.order.splits_inverse) * kChunkBytes;
    return {consumer, splits, bytes,
            consumer.smem + consumer.warpgroup * bytes + threadIdx.x % kWarpgroupThreads * uint32_t{sizeof(float4)}};
  }
  __device__ __forceinline__ uint32_t split_bytes() const { return kTile.team_size() * consumer_bytes; }

  // Of chunk c, the thread's vector i.
  static __device__ __forceinline__ float4 vector(const Sums& sums, int c, int i) {
    const float* v = sums[c / kPanelChunks] + c % kPanelChunks * kChunkSums + i * kVectorSums;
    return make_float4(v[0], v[1], v[2], v[3]);
  }

  // Of the team's chunks, those of other blocks.
  template <int kTeam>
  __device__ __forceinline__ void send(const Sums& sums) const {
    const int rank = consumer.split();
    const uint32_t at = own_place + rank * split_bytes();
    // blocks that split k share no activations: the number of the split is that of the block
    for_each_chunk(splits, [&](int c, int owner, int i) {
      if (owner == rank || !has(kTeam, i)) return;
      const uint32_t place = ptx::remote_address(at + i * kChunkBytes, owner);
      const uint32_t barrier = ptx::remote_address(consumer.received(), owner);
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        ptx::store_remote_counted(place + v * kVectorBytes, barrier, vector(sums, c, v));
    });
  }

  // All sums of the block's chunks are here.
  __device__ __forceinline__ void wait() const { ptx::mbarrier_wait_cluster(consumer.received(), 0); }

  // total = the sums of chunk c, the i-th that this block owns.
  __device__ __forceinline__ void add(float (&total)[kChunkSums], const Sums& sums, int c, int i) const {
    const uint32_t place = own_place + i * kChunkBytes;
#pragma unroll
    for (int j = 0; j < kChunkSums; ++j) total[j] = sums[c / kPanelChunks][c % kPanelChunks * kChunkSums + j];
    int from = consumer.split();
#pragma unroll 1
    for (int others = splits - 1; others > 0; --others) {
      if (++from == splits) from = 0;
      const uint32_t at = place + from * split_bytes();
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const uint4 u = ptx::load_shared_v4(at + v * kVectorBytes);
        total[v * kVectorSums] += __uint_as_float(u.x);
        total[v * kVectorSums + 1] += __uint_as_float(u.y);
        total[v * kVectorSums + 2] += __uint_as_float(u.z);
        total[v * kVectorSums + 3] += __uint_as_float(u.w);
      }
    }
  }
};

}  // namespace sparse_marlin::device
