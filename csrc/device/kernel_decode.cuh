// The decode kernel (mma.sp fed by bulk copies, compute capability 9.0) as an outline. Persistent: a block walks over output tiles; where
// k is split over a cluster, this does one.
#pragma once
#include "device/low_rank_decode.cuh"
#include "device/mainloop_decode.cuh"
#include "device/store_out.cuh"

namespace sparse_marlin::device {

// The sums of the warps along k meet in shared memory and are added in a fixed order; where k is split over a cluster, each block
// sends its sums of a vector (four features of a token) to the block that owns it, which adds them in the order of the blocks. Then
// channel scale, bias, one rounding.
template <typename Act, typename Warp, TileDecode kTile, ScaleMode kMode, bool kLowRank>
struct DecodeEpilogue {
  static constexpr int kPitch = kTile.block_n() + kEpiloguePad;
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
  __device__ __forceinline__ float* exchange() const {  // [warp along k][token][feature]
    return reinterpret_cast<float*>(shared_at(warp.smem + args.smem.exchange));
  }
  __device__ __forceinline__ float4* received() const {  // [split][vector]
    return reinterpret_cast<float4*>(shared_at(warp.smem + args.smem.received));
  }

  static __device__ __forceinline__ int thread() {
    int index = threadIdx.x;
    if constexpr (kLowRank) asm volatile("" : "+r"(index));  // as above
    return index;
  }

  static __device__ __forceinline__ void meet() { ptx::named_barrier(kBarrier, kThreads); }

  // Tokens of a pass: a block of the MMA's 8, as far as they exist.
  __device__ __forceinline__ int tokens() const { return min(args.smem.rows, kMmaTokens); }

  __device__ __forceinline__ void share(const typename Warp::Sums& sums, int pass) const {
    int lane = warp.lane;
    if constexpr (kLowRank) asm volatile("" : "+r"(lane));  // as above
    const int g = lane / format::kLanesPerRow, c = lane % format::kLanesPerRow;
    float* to = exchange() + warp.warp_k * tokens() * kPitch + warp.warp_n * Warp::kSlices * format::kSliceRows + g;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int token = 2 * c + j;
      if (token >= tokens()) continue;
#pragma unroll
      for (int s = 0; s < Warp::kSlices; ++s) {
        float* at = to + token * kPitch + s * format::kSliceRows;
        at[0] = sums.d[s][pass].reg[j];
        at[format::kHalfRows] = sums.d[s][pass].reg[2 + j];
      }
    }
  }

  static __device__ __forceinline__ float4 add(const float4& a, const float4& b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
  }
  // Vector i of the pass, all warps along k.
  __device__ __forceinline__ float4 total(const float* exchange, int i) const {
    const float* from = exchange + i / kRowVectors * kPitch + i % kRowVectors * kVectorFeatures;
    float4 v = *reinterpret_cast<const float4*>(from);
#pragma unroll
    for (int k = 1; k < kTile.warps_k; ++k) v = add(v, *reinterpret_cast<const float4*>(from + k * tokens() * kPitch));
    return v;
  }
  // The finished vector i of the tile.
  __device__ __forceinline__ void store(const BlockWork& work, int i, float4 v) const {
    const KernelArgs& g = args.gemm;
    const int token = work.tile_m * kTile.block_m + i / kRowVectors;
    const int n = work.tile_n * kTile.block_n() + i % kRowVectors * kVectorFeatures;
    if (token >= g.m || n >= g.n) return;
    const int count = min(kVectorFeatures, g.n - n);
    if (!kLowRank && g.group_size == kChannelwise) {  // with a correction the sums are scaled before it
      const Act* scales = static_cast<const Act*>(g.params.scales) + n;
      v.x *= to_float(scales[0]);
      if (count > 1) v.y *= to_float(scales[1]);
      if (count > 2) v.z *= to_float(scales[2]);
      if (count > 3) v.w *= to_float(scales[3]);
    }
    const Act* bias = static_cast<const Act*>(g.params.bias);
    store_out(static_cast<Act*>(g.params.out) + static_cast<int64_t>(token) * g.n + n,
              bias == nullptr ? nullptr : bias + n, v, count, g.n % kVectorFeatures == 0);
  }

  // To the blocks of the cluster that own the vectors of the pass.
  __device__ __forceinline__ void send(int pass) const {
    const int splits = args.gemm.splits, rank = ptx::cluster_block();
    const int slots = owned_vectors(kTile, args.smem.rows, splits), first = pass * kMmaTokens * kRowVectors;
    const int vectors = min(kMmaTokens * kRowVectors, args.smem.rows * kRowVectors - first);
    const uint32_t place = warp.smem + args.smem.received + rank * slots * kVectorBytes;
    const float* sums = exchange();
    for (int i = thread(); i < vectors; i += kThreads) {
      const int owner = (first + i) % splits, slot = (first + i) / splits;
      const float4 v = total(sums, i);
      if (owner == rank) {
        received()[rank * slots + slot] = v;
      } else {
        ptx::store_remote_counted(ptx::remote_address(place + slot * kVectorBytes, owner),
                                  ptx::remote_address(warp.received_full(), owner), v);
      }
    }
  }
  __device__ __forceinline__ void store_owned(const BlockWork& work) const {
    const int splits = args.gemm.splits, rank = ptx::cluster_block();
    const int slots = owned_vectors(kTile, args.smem.rows, splits);
    const float4* from_rank = received();
    ptx::mbarrier_wait_cluster(warp.received_full(), 0);
    for (int i = thread(); i < owned_vectors(kTile, args.smem.rows, splits, rank); i += kThreads) {
      float4 v = from_rank[i];
      for (int from = 1; from < splits; ++from) v = add(v, from_rank[from * slots + i]);
      store(work, i * splits + rank, v);
    }
  }

  __device__ __forceinline__ void run(const typename Warp::Sums& sums, const BlockWork& work, int tile) const {
    const bool again = tile >= warp.step();  // not the block's first
    const bool split = args.gemm.splits > 1;
    if (split) ptx::cluster_wait();  // the others' barriers are ready
#pragma unroll
    for (int pass = 0; pass < Warp::kBlocks; ++pass) {
      const int first = pass * kMmaTokens;
      if (first >= args.smem.rows) break;
      if (again || pass > 0) meet();  // the sums before have been read
      share(sums, pass);
      meet();
      // all warps have read their rows of the correction's factor
      if constexpr (kLowRank) {
        if (pass == 0 && threadIdx.x == 0 && tile + warp.step() < args.start.tiles)
          LowRankPlaces<kTile, kMode>{{args, warp.smem}}.ask_up(tile + warp.step());
      }
      if (split) {
        send(pass);
      } else {
        const float* all = exchange();
        for (int i = thread(); i < tokens() * kRowVectors; i += kThreads)
          store(work, first * kRowVectors + i, total(all, i));
      }
    }
    if (split) {
      meet();  // what the block keeps
      store_owned(work);
    }
  }
};

// Registers of a thread, at most: an SM holds t.blocks blocks, whose warps share out four times 16,384, by the 8 for a thread. No launch
// bounds, since a launch may bring idle warps (launch/spread.h). With a correction and small groups the widest tile has no
// registers left for two blocks.
constexpr int max_registers(const TileDecode& t, ScaleMode mode, bool low_rank) {
  constexpr int kSchedulers = 4, kOfScheduler = 16384 / format::kLanes, kUnit = 8;
  const int blocks = low_rank && mode == ScaleMode::kSteps && t.slices == 4 ? 1 : t.blocks;
  const int warps = (blocks * t.threads() / format::kLanes + kSchedulers - 1) / kSchedulers;
  return kOfScheduler / warps / kUnit * kUnit;
}

// The tile goes by its index in kTilesDecode, as in kernel_sm80.cuh.
// kLowRank: with a low-rank correction; a kernel of its own, so that the others keep their registers.
template <typename Act, int kBits, int kTileIndex, ScaleMode kMode, bool kLowRank>
__global__ void __maxnreg__(max_registers(kTilesDecode[kTileIndex], kMode, kLowRank))
    gemm_decode(const __grid_constant__ KernelArgsDecode args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr TileDecode kTile = kTilesDecode[kTileIndex];
  using Loader = DecodeLoader<kTile, kMode, kLowRank>;
  using Warp = DecodeWarp<Act, kBits, kTile, kMode, kLowRank>;
  using End = DecodeEpilogue<Act, Warp, kTile, kMode, kLowRank>;
  constexpr int kThreads = kTile.threads();
  // Barriers, besides the epilogue's, 1. All of shared memory's are ready for the warps that compute; for the one that loads; all warps
  // have ended.
  constexpr int kStart = 2, kReady = 3, kEnd = 4;
  extern __shared__ uint8_t shared[];
  const uint32_t unaligned = ptx::smem_address(shared);
  const uint32_t smem = (unaligned + kSwizzleAlign - 1) & ~uint32_t{kSwizzleAlign - 1};
  if constexpr (kLowRank) {
    if (static_cast<int>(blockIdx.x) < args.low.lead) {
      LowRankProject<Act, kTile>::run(args, shared);
      return;
    }
  }
  // the same in all lanes of a warp, which the compiler learns from the shuffle
  const int warp = __shfl_sync(~0u, threadIdx.x / format::kLanes, 0), lane = threadIdx.x % format::kLanes;

  const bool idle_warps = !kLowRank && blockDim.x > kThreads;
  if (idle_warps && warp > kTile.warps()) {  // keeps its registers to the end
    if (args.start.splits > 1) ptx::cluster_arrive();
    ptx::named_barrier(kEnd, blockDim.x);
    return;
  }

  const bool loads = warp == kTile.warps();
  const bool asks = loads && ptx::elect_one();
  const Loader loader{{args, smem}};
  const Warp mine{{args, smem},
                  lane,
                  warp % kTile.warps_n,
                  warp / kTile.warps_n,
                  smem + args.start.ring + warp * args.start.stages * Warp::kStageBytes,
                  smem + args.start.weights_full + warp * args.start.stages * kBarrierBytes};
  typename Loader::State asked;
  typename Warp::State state;
  typename Warp::Places places;
  if (loads) {
    if (asks) ptx::prefetch_map(&args.acts_map);
    if (asks && Loader::kScaled) ptx::prefetch_map(&args.scales_map);
    if (asks && kLowRank) ptx::prefetch_map(&args.up_map);
    if constexpr (kLowRank) {
      if (asks && LowRankPlaces<kTile, kMode>::corrects()) LowRankPlaces<kTile, kMode>{{args, smem}}.begin();
    }
    if (asks) asked = loader.prepare();
    if (asks && args.gemm.splits > 1) loader.expect_sums();
    __syncwarp();
    ptx::named_barrier_arrive(kStart, kThreads);
    if (asks) loader.begin(asked);
    __syncwarp();
    ptx::named_barrier(kReady, kThreads);
  } else {
    state = {mine.start(), mine.first_stage(), mine.first_chunk()};
    ptx::named_barrier_arrive(kReady, kThreads);
    places = mine.places();
    ptx::named_barrier(kStart, kThreads);
    mine.go_on(state.stream);
    mine.let_next_start(state.stream);
  }
  if (args.gemm.splits > 1) ptx::cluster_arrive();
  if (loads) {
    if constexpr (kLowRank) {
      if (LowRankPlaces<kTile, kMode>::corrects()) {
        const LowRankReceiver<kTile, kMode> receiver{{{args, smem}}};
        receiver.run(loader, asked, asks, lane);
        __syncwarp();
        if (asks) loader.run(asked);
        receiver.done(lane);
        return;
      }
    }
    if (asks) loader.run(asked);
    __syncwarp();
    if (idle_warps) ptx::named_barrier_arrive(kEnd, blockDim.x);
    return;
  }
  ptx::grid_dependency_wait();  // the output may still be in use by the kernel before
  const End end{args, mine};
  typename Warp::Sums sums;
  for (int tile = mine.first_tile(); tile < args.start.tiles; tile += mine.step()) {
    mine.run(sums, state, places);
    const BlockWork work = mine.work(tile);
    if constexpr (kLowRank)
      LowRankExpand<Act, Warp, kTile, kMode>{{{args, smem}}}.add(sums, mine, work, tile / mine.step());
    end.run(sums, work, tile);
  }
  if (idle_warps) ptx::named_barrier_arrive(kEnd, blockDim.x);
#endif
}

}  // namespace sparse_marlin::device
