// Sums of a consumer warpgroup -> output. A thread holds rows g and g + 8 of its warp's 16 features and token pairs; the output is
// tokens x features, so 8 x 8 blocks are stored transposed to shared memory, from where one tensor copy a pass writes 64 features of
// some tokens. With several splits the sums go to the workspace in float32, and reduce_splits finishes.
#pragma once
#include "device/epilogue.cuh"
#include "device/mainloop_sm90.cuh"

namespace sparse_marlin::device {

template <typename Act>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

template <typename Act, typename Consumer, TileSm90 kTile>
struct EpilogueSm90 {
  static constexpr int kPassTokens = Consumer::kSmem.pass_tokens;
  static constexpr int kPasses = kTile.block_m / kPassTokens;
  static constexpr int kBlockSums =
      4;  // of a thread in 16 features x 8 tokens: (g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1)
  using Sums = typename Consumer::Sums;

  const KernelArgsSm90& args;
  const uint32_t staging;  // of this warpgroup
  const int warpgroup;

  __device__ __forceinline__ void sync() const { ptx::named_barrier(1 + warpgroup, kWarpgroupThreads); }

  struct RowTerms {  // out = sum * scale + bias, of rows g and g + 8
    float scale[2];
    float bias[2];
  };
  __device__ __forceinline__ RowTerms row_terms(int feature, bool finish) const {
    const KernelArgs& g = args.gemm;
    const Act* scales = g.group_size == kChannelwise ? static_cast<const Act*>(g.params.scales) : nullptr;
    const Act* bias = finish ? static_cast<const Act*>(g.params.bias) : nullptr;
    RowTerms t;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int f = feature + i * format::kHalfRows;
      t.scale[i] = scales != nullptr && f < g.n ? to_float(scales[f]) : 1.0f;
      t.bias[i] = bias != nullptr && f < g.n ? to_float(bias[f]) : 0.0f;
    }
    return t;
  }

  // The warpgroup's panels, of which the first starts at feature0.
  __device__ __forceinline__ void store(const Sums& sums, const BlockWork& work, int feature0) const {
    const int token0 = work.tile_m * kTile.block_m;
    const int warp = threadIdx.x / format::kLanes % format::kTileSlices, lane = threadIdx.x % format::kLanes;
    const int row = warp * format::kSliceRows + lane / format::kLanesPerRow;
    const bool finish = args.gemm.splits == 1;
#pragma unroll
    for (int b = 0; b < Consumer::kPanels; ++b) {
      const int feature = feature0 + b * format::kTileRows;
      const RowTerms terms = row_terms(feature + row, finish);
      if (finish) {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
          stage_pass(sums[b], terms, pass, warp, lane);
          write_pass(feature, token0 + pass * kPassTokens);
        }
      } else {
        store_partials(sums[b], terms, work.split, feature + row, token0 + lane % format::kLanesPerRow * 2);
      }
    }
  }

  __device__ __forceinline__ void stage_pass(const float (&sums)[kTile.block_m / 2], const RowTerms& t, int pass,
                                             int warp, int lane) const {
    if (threadIdx.x % kWarpgroupThreads == 0) ptx::bulk_wait_read();  // the pass before has left the staging bytes
    sync();
#pragma unroll
    for (int j = 0; j < kPassTokens / kMmaTokens; j += 2) {  // two blocks of 8 tokens
      uint32_t v[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) {  // x % 2: rows g or g + 8, x / 2: block
        const int i = kBlockSums * (pass * kPassTokens / kMmaTokens + j + x / 2) + 2 * (x % 2);
        v[x] = pack_pair<Act>(sums[i] * t.scale[x % 2] + t.bias[x % 2], sums[i + 1] * t.scale[x % 2] + t.bias[x % 2]);
      }
      const int token = (j + lane / 16) * kMmaTokens + lane % 8, chunk = 2 * warp + lane / 8 % 2;
      ptx::stmatrix_x4_trans(staging + place(token, chunk), v);
    }
    ptx::fence_async_shared();
    sync();
  }

  // 16-byte chunk `chunk` of a token's 64 features, swizzled as the tensor copy reads it.
  static __device__ __forceinline__ uint32_t place(int token, int chunk) {
    return token * kSwizzleRowBytes + ((chunk ^ token % 8) << 4);
  }

  __device__ __forceinline__ void write_pass(int feature, int token0) const {
    const KernelArgs& g = args.gemm;
    const int thread = threadIdx.x % kWarpgroupThreads;
    if (args.out_mapped) {
      if (thread == 0) {
        ptx::tensor_store(&args.out_map, staging, feature, token0);
        ptx::bulk_commit();
      }
      return;
    }
    constexpr int kChunkValues = 16 / kActBytes;
    Act* out = static_cast<Act*>(g.params.out);
    for (int i = thread; i < kPassTokens * format::kTileRows; i += kWarpgroupThreads) {
      const int token = i / format::kTileRows, f = i % format::kTileRows;
      if (token0 + token >= g.m || feature + f >= g.n) continue;
      const uint32_t bits =
          ptx::load_shared_16(staging + place(token, f / kChunkValues) + f % kChunkValues * kActBytes);
      reinterpret_cast<uint16_t*>(out)[static_cast<int64_t>(token0 + token) * g.n + feature + f] =
          static_cast<uint16_t>(bits);
    }
    sync();  // read before the next pass overwrites it
  }

  __device__ __forceinline__ void store_partials(const float (&sums)[kTile.block_m / 2], const RowTerms& t, int split,
                                                 int row, int token0) const {
    const KernelArgs& g = args.gemm;
    float* out = g.partials + static_cast<int64_t>(split) * g.m * g.n;
#pragma unroll
    for (int i = 0; i < kTile.block_m / 2; ++i) {
      const int token = token0 + i / kBlockSums * kMmaTokens + i % 2, half = i / 2 % 2;
      const int f = row + half * format::kHalfRows;
      if (token < g.m && f < g.n) __stcg(out + static_cast<int64_t>(token) * g.n + f, sums[i] * t.scale[half]);
    }
  }
};

}  // namespace sparse_marlin::device
