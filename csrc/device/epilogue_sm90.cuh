// Sums of a consumer warpgroup -> output. A thread holds rows g and g + 8 of its warp's 16 features and token pairs; the output is
// tokens x features, so 8 x 8 blocks are stored transposed to shared memory, from where tensor copies write 64 features of some
// tokens.
#pragma once
#include "device/epilogue.cuh"
#include "device/exchange_sm90.cuh"
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

template <typename Act, typename Consumer, ShapeSm90 kTile>
struct EpilogueSm90 {
  static constexpr int kPassTokens = Consumer::kSmem.pass_tokens;
  static constexpr int kPasses = passes(kTile.block_m);
  static constexpr int kSlots = Consumer::kSmem.slots;
  static constexpr int kPassChunks = kPassTokens / kChunkTokens;
  static constexpr int kBlockSums =
      4;  // of a thread in 16 features x 8 tokens: (g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1)
  using Sums = typename Consumer::Sums;

  const KernelArgsSm90& args;
  const uint32_t staging;  // of this warpgroup: kSlots slots
  const int warpgroup;

  __device__ __forceinline__ void sync() const { ptx::named_barrier(1 + warpgroup, kWarpgroupThreads); }

  struct RowTerms {  // out = sum * scale + bias, of rows g and g + 8
    float scale[2];
    float bias[2];
  };
  // `feature`: the first of the warpgroup's 64.
  __device__ __forceinline__ RowTerms row_terms(int feature) const {
    const KernelArgs& g = args.gemm;
    feature += threadIdx.x / format::kLanes % format::kTileSlices * format::kSliceRows +
               threadIdx.x % format::kLanes / format::kLanesPerRow;
    const Act* scales = g.group_size == kChannelwise ? static_cast<const Act*>(g.params.scales) : nullptr;
    const Act* bias = static_cast<const Act*>(g.params.bias);
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
#pragma unroll
    for (int b = 0; b < Consumer::kPanels; ++b) {
      const int feature = feature0 + b * format::kTileRows;
      const RowTerms terms = row_terms(feature);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        constexpr int kLastTokens = kTile.block_m - (kPasses - 1) * kPassTokens;
        const int tokens = pass < kPasses - 1 ? kPassTokens : kLastTokens;
        const int i = b * kPasses + pass, first_row = i % kSlots * kPassTokens;
        if (i == 0) {
          free_staging<0>();
        } else if (i >= kSlots) {
          free_staging<kSlots - 1>();
        }
#pragma unroll
        for (int c = 0; c < tokens / kChunkTokens; ++c)
          stage_chunk(sums[b] + (pass * kPassChunks + c) * kChunkSums, terms, i % kSlots * kPassChunks + c);
        write(feature, token0 + pass * kPassTokens, first_row, tokens);
      }
    }
  }

  // Of a tile whose sums were exchanged, the chunks that this block owns.
  template <typename Exchange>
  __device__ __forceinline__ void store_owned(const Exchange& exchange, const BlockWork& work, int feature0) const {
    int i = 0;
    for (int c = exchange.consumer.split(); c < Exchange::kChunks; c += exchange.splits, ++i) {
      const int feature = feature0 + c / Exchange::kPanelChunks * format::kTileRows;
      const int slot = i % (kSlots * kPassChunks);  // of a chunk, in the staging bytes
      float total[kChunkSums];
      exchange.add(total, i);
      if (slot == 0) free_staging<0>();
      stage_chunk(total, row_terms(feature), slot);
      write(feature, work.tile_m * kTile.block_m + c % Exchange::kPanelChunks * kChunkTokens, slot * kChunkTokens,
            kChunkTokens);
    }
  }

  // What was staged before has left, but for the last kPending passes.
  template <int kPending>
  __device__ __forceinline__ void free_staging() const {
    if (threadIdx.x % kWarpgroupThreads == 0) ptx::bulk_wait_read<kPending>();
    sync();
  }

  // 16 tokens, to the chunk-th 16 rows of the staging bytes.
  __device__ __forceinline__ void stage_chunk(const float* sums, const RowTerms& t, int chunk) const {
    const int warp = threadIdx.x / format::kLanes % format::kTileSlices, lane = threadIdx.x % format::kLanes;
    uint32_t v[4];
#pragma unroll
    for (int x = 0; x < 4; ++x) {  // x % 2: rows g or g + 8, x / 2: block of 8 tokens
      const float* two = sums + kBlockSums * (x / 2) + 2 * (x % 2);
      v[x] = pack_pair<Act>(two[0] * t.scale[x % 2] + t.bias[x % 2], two[1] * t.scale[x % 2] + t.bias[x % 2]);
    }
    const int token = chunk * kChunkTokens + lane / 16 * kMmaTokens + lane % 8;
    ptx::stmatrix_x4_trans(staging + place(token, 2 * warp + lane / 8 % 2), v);
  }

  // 16-byte piece `piece` of a token's 64 features, swizzled as the tensor copy reads it.
  static __device__ __forceinline__ uint32_t place(int token, int piece) {
    return token * kSwizzleRowBytes + ((piece ^ token % 8) << 4);
  }

  // Staged rows row0 .. row0 + rows - 1 to the tokens from token0 on.
  __device__ __forceinline__ void write(int feature, int token0, int row0, int rows) const {
    const KernelArgs& g = args.gemm;
    const int thread = threadIdx.x % kWarpgroupThreads;
    ptx::fence_async_shared();
    sync();
    if (args.out_mapped) {
      if (thread == 0) {
        for (int row = 0; row < rows; row += args.store_tokens)
          ptx::tensor_store(&args.out_map, staging + (row0 + row) * kSwizzleRowBytes, feature, token0 + row);
        ptx::bulk_commit();
      }
      return;
    }
    constexpr int kPieceValues = kCopyBytes / kActBytes;
    uint16_t* out = static_cast<uint16_t*>(g.params.out);
    for (int i = thread; i < rows * format::kTileRows; i += kWarpgroupThreads) {
      const int row = i / format::kTileRows, f = i % format::kTileRows;
      if (token0 + row >= g.m || feature + f >= g.n) continue;
      const uint32_t bits =
          ptx::load_shared_16(staging + place(row0 + row, f / kPieceValues) + f % kPieceValues * kActBytes);
      out[static_cast<int64_t>(token0 + row) * g.n + feature + f] = static_cast<uint16_t>(bits);
    }
    sync();  // read before it is overwritten
  }
};

}  // namespace sparse_marlin::device
