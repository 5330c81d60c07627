// Where k is split over the blocks of a cluster: the sums of a tile meet in distributed shared memory. Chunk c (16 tokens x 64
// features of a consumer, 8 sums a thread) belongs to block c % splits, which gets every other block's sums of it and adds all up in
// the order of the splits: the same result in every run.
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

  const Consumer& consumer;
  const int splits;
  const uint32_t consumer_bytes;  // of the chunks that a block owns, for one consumer and split
  const uint32_t own_place;       // of this thread, in the first chunk of the first split

  static __device__ __forceinline__ ExchangeSm90 of(const Consumer& consumer, int splits) {
    const uint32_t bytes = owned_chunks(kTile, splits) * kChunkBytes;
    return {consumer, splits, bytes,
            consumer.smem + consumer.warpgroup * bytes + threadIdx.x % kWarpgroupThreads * uint32_t{sizeof(float4)}};
  }
  __device__ __forceinline__ uint32_t split_bytes() const { return kTile.team_size() * consumer_bytes; }

  // Of chunk c, the thread's vector i.
  static __device__ __forceinline__ float4 vector(const Sums& sums, int c, int i) {
    const float* v = sums[c / kPanelChunks] + c % kPanelChunks * kChunkSums + i * kVectorSums;
    return make_float4(v[0], v[1], v[2], v[3]);
  }

  __device__ __forceinline__ void send(const Sums& sums) const {
    const int rank = consumer.split();
    uint32_t at = own_place + rank * split_bytes();
    int to = 0;  // blocks that split k share no activations: the number of the split is that of the block
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (to != rank) {
        const uint32_t place = ptx::remote_address(at, to);
        const uint32_t barrier = ptx::remote_address(consumer.received(), to);
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
          ptx::store_remote_counted(place + i * kVectorBytes, barrier, vector(sums, c, i));
      }
      if (++to == splits) {
        to = 0;
        at += kChunkBytes;
      }
    }
  }

  // All sums of the block's chunks are here.
  __device__ __forceinline__ void wait() const { ptx::mbarrier_wait_cluster(consumer.received(), 0); }

  // total = the sums of chunk c, the i-th that this block owns.
  __device__ __forceinline__ void add(float (&total)[kChunkSums], const Sums& sums, int c, int i) const {
    const int rank = consumer.split();
#pragma unroll
    for (float& t : total) t = 0;
    uint32_t at = own_place + i * kChunkBytes;
#pragma unroll 1
    for (int from = 0; from < splits; ++from, at += split_bytes()) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        float4 v = vector(sums, c, j);
        if (from != rank) {
          const uint4 u = ptx::load_shared_v4(at + j * kVectorBytes);
          v = {__uint_as_float(u.x), __uint_as_float(u.y), __uint_as_float(u.z), __uint_as_float(u.w)};
        }
        total[j * kVectorSums] += v.x;
        total[j * kVectorSums + 1] += v.y;
        total[j * kVectorSums + 2] += v.z;
        total[j * kVectorSums + 3] += v.w;
      }
    }
  }
};

}  // namespace sparse_marlin::device
