// The decode kernel (mma.sp fed by bulk copies, compute capability 9.0) as an outline. Persistent: a block walks over output tiles.
#pragma once
#include "device/epilogue.cuh"
#include "device/mainloop_decode.cuh"

namespace sparse_marlin::device {

// The sums of the warps along k meet in shared memory and are added in a fixed order; then channel scale, bias, one rounding.
template <typename Act, typename Warp, TileDecode kTile>
struct DecodeEpilogue {
  static constexpr int kPitch = kTile.block_n() + kEpiloguePad;
  static constexpr int kBarrier = 1;  // of the warps that compute

  const KernelArgsDecode& args;
  float* exchange;  // [warp along k][token][feature]

  static __device__ __forceinline__ void meet() { ptx::named_barrier(kBarrier, kTile.warps() * format::kLanes); }

  // Tokens of a pass: a block of the MMA's 8, as far as they exist.
  __device__ __forceinline__ int tokens() const { return min(args.smem.rows, kMmaTokens); }

  __device__ __forceinline__ void share(const typename Warp::Sums& sums, const Warp& warp, int pass) const {
    const int g = warp.lane / format::kLanesPerRow, c = warp.lane % format::kLanesPerRow;
    float* to = exchange + warp.warp_k * tokens() * kPitch + warp.warp_n * Warp::kSlices * format::kSliceRows + g;
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

  __device__ __forceinline__ void store(const BlockWork& work, int pass) const {
    const KernelArgs& g = args.gemm;
    constexpr int kRowThreads = kTile.block_n() / kVector;
    const bool aligned = g.n % kVector == 0;
    for (int i = threadIdx.x; i < tokens() * kRowThreads; i += kTile.warps() * format::kLanes) {
      const int row = i / kRowThreads, feature = i % kRowThreads * kVector;
      const int token = work.tile_m * kTile.block_m + pass * kMmaTokens + row,
                n = work.tile_n * kTile.block_n() + feature;
      if (token >= g.m || n >= g.n) continue;
      const int count = min(kVector, g.n - n);
      float4 v = *reinterpret_cast<const float4*>(exchange + row * kPitch + feature);
#pragma unroll
      for (int k = 1; k < kTile.warps_k; ++k) {
        const float4 u = *reinterpret_cast<const float4*>(exchange + (k * tokens() + row) * kPitch + feature);
        v = {v.x + u.x, v.y + u.y, v.z + u.z, v.w + u.w};
      }
      if (g.group_size == kChannelwise) {
        const Act* scales = static_cast<const Act*>(g.params.scales) + n;
        v.x *= to_float(scales[0]);
        if (count > 1) v.y *= to_float(scales[1]);
        if (count > 2) v.z *= to_float(scales[2]);
        if (count > 3) v.w *= to_float(scales[3]);
      }
      const Act* bias = static_cast<const Act*>(g.params.bias);
      store_out(static_cast<Act*>(g.params.out) + static_cast<int64_t>(token) * g.n + n,
                bias == nullptr ? nullptr : bias + n, v, count, aligned);
    }
  }
};

// The tile goes by its index in kTilesDecode, as in kernel_sm80.cuh.
template <typename Act, int kBits, int kTileIndex, ScaleMode kMode>
__global__ void __launch_bounds__(kTilesDecode[kTileIndex].threads(), kTilesDecode[kTileIndex].blocks)
    gemm_decode(const __grid_constant__ KernelArgsDecode args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr TileDecode kTile = kTilesDecode[kTileIndex];
  using Loader = DecodeLoader<kTile, kMode>;
  using Warp = DecodeWarp<Act, kBits, kTile, kMode>;
  using End = DecodeEpilogue<Act, Warp, kTile>;
  extern __shared__ uint8_t shared[];
  const uint32_t unaligned = ptx::smem_address(shared);
  const uint32_t smem = (unaligned + kSwizzleAlign - 1) & ~uint32_t{kSwizzleAlign - 1};
  // the same in all lanes of a warp, which the compiler learns from the shuffle
  const int warp = __shfl_sync(~0u, threadIdx.x / format::kLanes, 0), lane = threadIdx.x % format::kLanes;

  if (warp == kTile.warps()) {
    const Loader loader{{args, smem}};
    if (lane == 0) loader.init_chunk_barriers();
    __syncthreads();
    if (ptx::elect_one()) loader.run();
    return;
  }
  const uint64_t policy = args.gemm.tiles_m == 1 ? ptx::policy_evict_first() : ptx::policy_evict_normal();
  const Warp mine{{args, smem},
                  lane,
                  warp % kTile.warps_n,
                  warp / kTile.warps_n,
                  smem + args.smem.weights + warp * args.smem.stages * Warp::kStageBytes,
                  smem + args.smem.weights_full + warp * args.smem.stages * kBarrierBytes,
                  policy};
  typename Warp::State state{mine.start(), mine.first_stage(), mine.first_chunk()};
  const typename Warp::Places places = mine.places();
  __syncthreads();
  ptx::grid_dependency_wait();  // the output may still be in use by the kernel before
  const End end{args, reinterpret_cast<float*>(shared + (smem - unaligned) + args.smem.exchange)};
  typename Warp::Sums sums;
  for (int tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
    mine.run(sums, state, places);
#pragma unroll
    for (int pass = 0; pass < Warp::kBlocks; ++pass) {
      if (pass * kMmaTokens >= args.smem.rows) break;
      if (tile != static_cast<int>(blockIdx.x) || pass > 0) End::meet();  // the sums before have been read
      end.share(sums, mine, pass);
      End::meet();
      end.store(mine.work(tile), pass);
    }
  }
#endif
}

}  // namespace sparse_marlin::device
