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
  // Where this thread's part of the end takes place. Worked out before the main loop: at a tile's end nothing hides a row of dependent
  // instructions. Not with scales of steps, which leave too few registers; tiles of 16 tokens with a correction measured slower so.
  static constexpr bool kWayAhead = kMode != ScaleMode::kSteps && !(kLowRank && Warp::kBlocks > 1);
  struct Way {
    uint32_t to;    // in shared memory: its sums of its first token
    uint32_t from;  // and its first vector, as the first warp along k left it
    int tokens;     // of the tile from its first one on, in shared memory;
    int exist;      // of all of the tile, in the output
    int count;      // features that exist of its vectors, all of the same ones
    Act* out;       // its first vector
  };
  __device__ __forceinline__ bool in_ring() const { return Warp::kBlocks > 1 && args.start.tiles <= warp.step(); }
  __device__ __forceinline__ int ring_bytes() const { return args.start.stages * Warp::kStageBytes; }
  __device__ __forceinline__ Way way(const BlockWork& work) const {
    const KernelArgs& g = args.gemm;
    int lane = warp.lane, vector = threadIdx.x;
    if (!kWayAhead) asm volatile("" : "+r"(lane), "+r"(vector));  // not before the main loop either
    const int row = lane / format::kLanesPerRow, column = 2 * (lane % format::kLanesPerRow);
    const int token = vector / kRowVectors, feature = vector % kRowVectors * kVectorFeatures;
    Way w;
    if (in_ring()) {  // [warp along k][warp along features][token][feature of the warp]
      const uint32_t ring = warp.smem + args.start.ring;
      w.to = ring + (warp.warp_k * kTile.warps_n + warp.warp_n) * ring_bytes() +
             (column * kWarpPitch + row) * uint32_t{sizeof(float)};
      w.from = ring + feature / kWarpFeatures * ring_bytes() +
               (token * kWarpPitch + feature % kWarpFeatures) * uint32_t{sizeof(float)};
    } else {  // [warp along k][token][feature]
      const uint32_t exchange = warp.smem + args.smem.exchange;
      w.to = exchange +
             ((warp.warp_k * tokens() + column) * kPitch + warp.warp_n * kWarpFeatures + row) * uint32_t{sizeof(float)};
      w.from = exchange + (token * kPitch + feature) * uint32_t{sizeof(float)};
    }
    w.tokens = args.smem.rows - column;
    w.exist = min(args.smem.rows, g.m - work.tile_m * kTile.block_m);
    const int n = work.tile_n * kTile.block_n() + feature;
    w.count = min(kVectorFeatures, g.n - n);
    w.out = static_cast<Act*>(g.params.out) + static_cast<int64_t>(work.tile_m * kTile.block_m + token) * g.n + n;
    return w;
  }
  // Of this thread's vectors.
  static __device__ __forceinline__ int first_feature(const BlockWork& work) {
    return work.tile_n * kTile.block_n() + static_cast<int>(threadIdx.x) % kRowVectors * kVectorFeatures;
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
  __device__ __forceinline__ void share(const typename Warp::Sums& sums, const Way& way, int pass, int first) const {
    constexpr int kRow = kInRing ? kWarpPitch : kPitch;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (pass * kMmaTokens + j >= way.tokens) continue;
      float* to = reinterpret_cast<float*>(shared_at(way.to)) + (first + j) * kRow;
#pragma unroll
      for (int s = 0; s < Warp::kSlices; ++s) {
        to[s * format::kSliceRows] = sums.d[s][pass].reg[j];
        to[s * format::kSliceRows + format::kHalfRows] = sums.d[s][pass].reg[2 + j];
      }
    }
  }

  static __device__ __forceinline__ float4 add(const float4& a, const float4& b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
  }
  // A vector, whose sums of the first warp along k are at `from`: all warps'.
  template <bool kInRing>
  __device__ __forceinline__ float4 total(uint32_t from) const {
    const int step = kInRing ? kTile.warps_n * ring_bytes() : tokens() * kPitch * int{sizeof(float)};
    float4 v = *reinterpret_cast<const float4*>(shared_at(from));
#pragma unroll
    for (int k = 1; k < kTile.warps_k; ++k) v = add(v, *reinterpret_cast<const float4*>(shared_at(from + k * step)));
    return v;
  }
  // Tokens from a thread's vector to its next, and bytes from the sums of one to those of the other.
  static constexpr int kNextTokens = kThreads / kRowVectors;
  template <bool kInRing>
  static constexpr int next_bytes() {
    return kNextTokens * (kInRing ? kWarpPitch : kPitch) * int{sizeof(float)};
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
  // A finished vector; feature(): its first one.
  template <typename Feature>
  __device__ __forceinline__ void store(Act* out, float4 v, const Feature& feature, int count,
                                        const uint2& fetched) const {
    const KernelArgs& g = args.gemm;
    if (kScaledHere) {
      v = times(v, count == kVectorFeatures ? fetched
                                            : some_scales(static_cast<const Act*>(g.params.scales) + feature(), count));
    }
    const Act* const bias = static_cast<const Act*>(g.params.bias);
    store_out(out, bias == nullptr ? nullptr : bias + feature(), v, count, g.n % kVectorFeatures == 0);
  }
  // The finished vector i of the tile.
  __device__ __forceinline__ void store(const BlockWork& work, int i, const float4& v, const uint2& fetched) const {
    const KernelArgs& g = args.gemm;
    const int token = work.tile_m * kTile.block_m + i / kRowVectors;
    const int n = work.tile_n * kTile.block_n() + i % kRowVectors * kVectorFeatures;
    if (token >= g.m || n >= g.n) return;
    store(
        static_cast<Act*>(g.params.out) + static_cast<int64_t>(token) * g.n + n, v, [&] { return n; },
        min(kVectorFeatures, g.n - n), fetched);
  }

  // Vectors first .. first + count of the tile, to the blocks of the cluster that own them. Loops that a thread goes through once or
  // twice are not unrolled here: none of this code is in an instruction cache yet.
  template <bool kInRing>
  __device__ __forceinline__ void send(const Way& way, int first, int count) const {
    const int splits = args.gemm.splits, rank = ptx::cluster_block();
    const int slots = args.smem.owned;
    const uint32_t place = warp.smem + args.smem.received + rank * slots * kVectorBytes;
    uint32_t from = way.from;
#pragma unroll 1
    for (int i = thread(); i < count; i += kThreads, from += next_bytes<kInRing>()) {
      const int slot = divide(first + i, args.splits_inverse), owner = first + i - slot * splits;
      const float4 v = total<kInRing>(from);
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

  // The same, finished and stored or sent; first: token of the tile, count: tokens.
  template <bool kInRing>
  __device__ __forceinline__ void finish(int tile, const Way& way, int first, int count, const uint2& fetched) const {
    if (args.gemm.splits > 1) {
      send<kInRing>(way, first * kRowVectors, count * kRowVectors);
      return;
    }
    if (way.count <= 0) return;
    const int exist = min(count, way.exist - first) * kRowVectors;
    uint32_t from = way.from;
    Act* out = way.out + static_cast<int64_t>(first) * args.gemm.n;
    const auto feature = [&] { return first_feature(warp.work(tile)); };
#pragma unroll 1
    for (int i = thread(); i < exist; i += kThreads, from += next_bytes<kInRing>()) {
      store(out, total<kInRing>(from), feature, way.count, fetched);
      out += static_cast<int64_t>(kNextTokens) * args.gemm.n;
    }
  }
  // All warps have read their rows of the correction's factor: those of the block's next tile.
  __device__ __forceinline__ void ask_up(int next) const {
    if constexpr (kLowRank) {
      if (threadIdx.x == 0 && next < args.start.tiles) LowRankPlaces<kTile, kMode>{{args, warp.smem}}.ask_up(next);
    }
  }

  __device__ __forceinline__ void run(const typename Warp::Sums& sums, const Way& way, int tile,
                                      const uint2& fetched) const {
    const bool split = args.gemm.splits > 1;
    if (split) ptx::cluster_wait();  // the others' barriers are ready
    const int next = tile + warp.step();
    if (in_ring()) {
#pragma unroll
      for (int pass = 0; pass < Warp::kBlocks; ++pass) share<true>(sums, way, pass, pass * kMmaTokens);
      meet();
      finish<true>(tile, way, 0, args.smem.rows, fetched);
    } else {
#pragma unroll
      for (int pass = 0; pass < Warp::kBlocks; ++pass) {
        const int first = pass * kMmaTokens;
        if (pass > 0 && first >= args.smem.rows) break;
        if (tile >= warp.step() || pass > 0) meet();  // the sums before have been read
        share<false>(sums, way, pass, 0);
        meet();
        if (pass == 0) ask_up(next);
        finish<false>(tile, way, first, min(tokens(), args.smem.rows - first), fetched);
      }
    }
    if (split) {
      meet();  // what the block keeps
      store_owned(warp.work(tile), fetched);
    }
  }
};

}  // namespace sparse_marlin::device
