// The end of an output tile in the decode kernel: sums of the warps and of the cluster, scale, bias, store.
#pragma once
#include "device/low_rank_decode.cuh"
#include "device/mainloop_decode.cuh"
#include "device/store_out.cuh"

namespace sparse_marlin::device {

// The sums of the warps along k meet in shared memory and are added in a fixed order; where k is split over a cluster, each block
// sends its sums of a vector (four features of a token) to the block that owns it, which adds them in the order of the blocks. Then
// channel scale, bias, one rounding.
//
// A block with one output tile has no more use for its rings of weights, and a warp leaves all its sums in its own; where blocks walk,
// they go through bytes of their own, 8 tokens at a time.
template <typename Act, typename Warp, TileDecode kTile, ScaleMode kMode, bool kLowRank>
struct DecodeEpilogue {
  static constexpr int kPitch = kTile.block_n() + kEpiloguePad;
  static constexpr int kWarpFeatures = Warp::kSlices * format::kSliceRows, kWarpPitch = kWarpFeatures + kEpiloguePad;
  static_assert(kTile.block_m * kWarpPitch * int{sizeof(float)} <= kMinStagesDecode * Warp::kStageBytes);
  static constexpr int kBarrier = 1;  // of the warps that compute
  static constexpr int kThreads = kTile.warps() * format::kLanes;
  static constexpr int kRowVectors = kTile.block_n() / kVectorFeatures;
  static_assert(kVectorFeatures == kVector);

  const KernelArgsDecode& args;
  const Warp& warp;

  // Worked out where they are needed: the main loop has no registers for them.
  static __device__ __forceinline__ uint8_t* shared_at(uint32_t address) {
    asm volatile("" : "+r"(address));
    return static_cast<uint8_t*>(__cvta_shared_to_generic(address));
  }
  // The sums of the warps `warp_k` along k.
  template <bool kInRing>
  __device__ __forceinline__ float* sums_at(int warp_k, int token, int feature) const {
    if constexpr (kInRing) {  // [warp along k][warp along features][token][feature of the warp]
      const int of = warp_k * kTile.warps_n + feature / kWarpFeatures;
      float* ring =
          reinterpret_cast<float*>(shared_at(warp.smem + args.start.ring + of * args.start.stages * Warp::kStageBytes));
      return ring + token * kWarpPitch + feature % kWarpFeatures;
    } else {  // [warp along k][token][feature]
      float* exchange = reinterpret_cast<float*>(shared_at(warp.smem + args.smem.exchange));
      return exchange + (warp_k * tokens() + token) * kPitch + feature;
    }
  }
  __device__ __forceinline__ float4* received() const {  // [split][vector]
    return reinterpret_cast<float4*>(shared_at(warp.smem + args.smem.received));
  }

  static __device__ __forceinline__ int thread() {
    int index = threadIdx.x;
    asm volatile("" : "+r"(index));  // as above
    return index;
  }

  static __device__ __forceinline__ void meet() { ptx::named_barrier(kBarrier, kThreads); }

  // Tokens of a pass: a block of the MMA's 8, as far as they exist.
  __device__ __forceinline__ int tokens() const { return min(args.smem.rows, kMmaTokens); }

  // first: token of the pass where its sums go
  template <bool kInRing>
  __device__ __forceinline__ void share(const typename Warp::Sums& sums, int pass, int first) const {
    int lane = warp.lane;
    asm volatile("" : "+r"(lane));  // as above
    const int g = lane / format::kLanesPerRow, c = lane % format::kLanesPerRow;
    constexpr int kRow = kInRing ? kWarpPitch : kPitch;
    float* to = sums_at<kInRing>(warp.warp_k, first, warp.warp_n * kWarpFeatures) + g;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int token = 2 * c + j;
      if (pass * kMmaTokens + token >= args.smem.rows) continue;
#pragma unroll
      for (int s = 0; s < Warp::kSlices; ++s) {
        float* at = to + token * kRow + s * format::kSliceRows;
        at[0] = sums.d[s][pass].reg[j];
        at[format::kHalfRows] = sums.d[s][pass].reg[2 + j];
      }
    }
  }

  static __device__ __forceinline__ float4 add(const float4& a, const float4& b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
  }
  // Vector i of those that are there, all warps along k.
  template <bool kInRing>
  __device__ __forceinline__ float4 total(int i) const {
    const int token = i / kRowVectors, feature = i % kRowVectors * kVectorFeatures;
    float4 v = *reinterpret_cast<const float4*>(sums_at<kInRing>(0, token, feature));
#pragma unroll
    for (int k = 1; k < kTile.warps_k; ++k)
      v = add(v, *reinterpret_cast<const float4*>(sums_at<kInRing>(k, token, feature)));
    return v;
  }
  // Scales of whole channels; with a correction the sums are scaled before it.
  static constexpr bool kScaledHere = !kLowRank && kMode == ScaleMode::kNone;
  // Those of the features that this thread finishes, the same ones whatever the vector. Asked for before the main loop: behind it they
  // would cost a way to memory.
  __device__ __forceinline__ uint2 fetch_scales(const BlockWork& work) const {
    static_assert(kThreads % kRowVectors == 0);
    if (!kScaledHere) return {};
    const int splits = args.gemm.splits;
    const int vector = splits > 1 ? thread() * splits + ptx::cluster_block() : thread();
    const int n = work.tile_n * kTile.block_n() + vector % kRowVectors * kVectorFeatures;
    if (n + kVectorFeatures > args.gemm.n) return {};
    return *reinterpret_cast<const uint2*>(static_cast<const Act*>(args.gemm.params.scales) + n);
  }
  static __device__ __forceinline__ uint2 some_scales(const Act* scales, int count) {
    Act some[kVectorFeatures] = {};
#pragma unroll
    for (int j = 0; j < kVectorFeatures; ++j)
      if (j < count) some[j] = scales[j];
    uint2 bits;
    memcpy(&bits, some, sizeof(bits));
    return bits;
  }
  static __device__ __forceinline__ float4 times(const float4& v, const uint2& scales) {
    return {v.x * Pair<Act>::to_float(scales.x), v.y * Pair<Act>::high_to_float(scales.x),
            v.z * Pair<Act>::to_float(scales.y), v.w * Pair<Act>::high_to_float(scales.y)};
  }
  // The finished vector i of the tile.
  __device__ __forceinline__ void store(const BlockWork& work, int i, float4 v, const uint2& fetched) const {
    const KernelArgs& g = args.gemm;
    const int token = work.tile_m * kTile.block_m + i / kRowVectors;
    const int n = work.tile_n * kTile.block_n() + i % kRowVectors * kVectorFeatures;
    if (token >= g.m || n >= g.n) return;
    const int count = min(kVectorFeatures, g.n - n);
    if (kScaledHere) {
      const Act* scales = static_cast<const Act*>(g.params.scales) + n;
      v = times(v, count == kVectorFeatures ? fetched : some_scales(scales, count));
    }
    const Act* bias = static_cast<const Act*>(g.params.bias);
    store_out(static_cast<Act*>(g.params.out) + static_cast<int64_t>(token) * g.n + n,
              bias == nullptr ? nullptr : bias + n, v, count, g.n % kVectorFeatures == 0);
  }

  // Vectors first .. first + count of the tile, to the blocks of the cluster that own them. Loops that a thread goes through once or
  // twice are not unrolled here: none of this code is in an instruction cache yet.
  template <bool kInRing>
  __device__ __forceinline__ void send(int first, int count) const {
    const int splits = args.gemm.splits, rank = ptx::cluster_block();
    const int slots = args.smem.owned;
    const uint32_t place = warp.smem + args.smem.received + rank * slots * kVectorBytes;
#pragma unroll 1
    for (int i = thread(); i < count; i += kThreads) {
      const int slot = divide(first + i, args.splits_inverse), owner = first + i - slot * splits;
      const float4 v = total<kInRing>(i);
      if (owner == rank) {
        received()[rank * slots + slot] = v;
      } else {
        ptx::store_remote_counted(ptx::remote_address(place + slot * kVectorBytes, owner),
                                  ptx::remote_address(warp.received_full(), owner), v);
      }
    }
  }
  __device__ __forceinline__ void store_owned(const BlockWork& work, const uint2& fetched) const {
    const int splits = args.gemm.splits, rank = ptx::cluster_block();
    const int slots = args.smem.owned, owned = warp.owned_vectors(rank);
    const float4* from_rank = received();
    ptx::mbarrier_wait_cluster(warp.received_full(), 0);
#pragma unroll 1
    for (int i = thread(); i < owned; i += kThreads) {
      float4 v = from_rank[i];
#pragma unroll 1
      for (int from = 1; from < splits; ++from) v = add(v, from_rank[from * slots + i]);
      store(work, i * splits + rank, v, fetched);
    }
  }

  // The same, finished and stored or sent.
  template <bool kInRing>
  __device__ __forceinline__ void finish(const BlockWork& work, int first, int count, const uint2& fetched) const {
    if (args.gemm.splits > 1) {
      send<kInRing>(first, count);
    } else {
#pragma unroll 1
      for (int i = thread(); i < count; i += kThreads) store(work, first + i, total<kInRing>(i), fetched);
    }
  }
  // All warps have read their rows of the correction's factor: those of the block's next tile.
  __device__ __forceinline__ void ask_up(int next) const {
    if constexpr (kLowRank) {
      if (threadIdx.x == 0 && next < args.start.tiles) LowRankPlaces<kTile, kMode>{{args, warp.smem}}.ask_up(next);
    }
  }

  __device__ __forceinline__ void run(const typename Warp::Sums& sums, const BlockWork& work, int tile,
                                      const uint2& fetched) const {
    const bool split = args.gemm.splits > 1;
    if (split) ptx::cluster_wait();  // the others' barriers are ready
    const int next = tile + warp.step();
    if (Warp::kBlocks > 1 && args.start.tiles <= warp.step()) {
#pragma unroll
      for (int pass = 0; pass < Warp::kBlocks; ++pass) share<true>(sums, pass, pass * kMmaTokens);
      meet();
      finish<true>(work, 0, args.smem.rows * kRowVectors, fetched);
    } else {
#pragma unroll
      for (int pass = 0; pass < Warp::kBlocks; ++pass) {
        const int first = pass * kMmaTokens;
        if (first >= args.smem.rows) break;
        if (tile >= warp.step() || pass > 0) meet();  // the sums before have been read
        share<false>(sums, pass, 0);
        meet();
        if (pass == 0) ask_up(next);
        finish<false>(work, first * kRowVectors, min(tokens(), args.smem.rows - first) * kRowVectors, fetched);
      }
    }
    if (split) {
      meet();  // what the block keeps
      store_owned(work, fetched);
    }
  }
};

}  // namespace sparse_marlin::device
