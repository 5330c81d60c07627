// Sums of a consumer warpgroup -> output. A thread holds rows g and g + 8 of its warp's 16 features and token pairs; the output is
// tokens x features, so 8 x 8 blocks are stored transposed to shared memory, some tokens at a pass. From there
//   - each thread takes 16 bytes of a chunk, 16 tokens x 64 features, where a block has one tile: tensor copies end later, a chain of layers is
//     1 to 2 % slower with them; and where no copy can take the output
//   - tensor copies take a pass each where a block has several tiles, while the next one is multiplied. When all SMs store, memory takes no
//     more than 20 bytes a clock from each, and the threads waited for that 7 to 8 % of the time of a tile with k = 4096.
#pragma once
#include "device/epilogue.cuh"
#include "device/exchange_sm90.cuh"
#include "device/mainloop_sm90.cuh"
#include "device/ptx/bulk_copy.cuh"

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
  static constexpr int kPasses = Consumer::kSmem.passes;
  static constexpr int kSlots = Consumer::kSmem.slots;
  static constexpr int kPassChunks = kPassTokens / kChunkTokens;
  static constexpr int kPieceValues = kCopyBytes / kActBytes, kRowPieces = format::kTileRows / kPieceValues;
  static constexpr int kStagedBytes = kChunkTokens * kSwizzleRowBytes;  // of a chunk
  static_assert(kWarpgroupThreads == kChunkTokens * kRowPieces);
  static constexpr int kBlockSums =
      4;  // of a thread in 16 features x 8 tokens: (g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1)
  using Sums = typename Consumer::Sums;

  const KernelArgsSm90& args;
  const uint32_t staging;  // of this warpgroup: kSlots slots
  const int warpgroup;

  __device__ __forceinline__ void sync() const { ptx::named_barrier(1 + warpgroup, kWarpgroupThreads); }

  // What the main loop and the end of a tile read of the arguments, into the constant cache while there is nothing else to do. A read
  // that decides nothing would be left out by the compiler.
  __device__ __forceinline__ void fetch_arguments() const {
    if (args.gemm.m == 0 || args.gemm.params.out == nullptr || args.zero != 0) __trap();
  }

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
        const int chunks = (pass < kPasses - 1 ? kPassTokens : kLastTokens) / kChunkTokens;
        const int i = b * kPasses + pass, first = i % kSlots * kPassChunks, token = token0 + pass * kPassTokens;
        // What was staged here has been read: by a copy, or, with several slots, because all have come to the pass after that one.
        if (copies_out() && i == 0) wait_copied();
        if (copies_out() && i >= kSlots) wait_copied(i - kSlots);
        if (i == 0 || kSlots == 1 || (copies_out() && i >= kSlots)) sync();
#pragma unroll
        for (int c = 0; c < chunks; ++c)
          stage_chunk(stage_place(), sums[b] + (pass * kPassChunks + c) * kChunkSums, terms, first + c);
        if (copies_out()) ptx::fence_async_shared();
        sync();
        if (copies_out()) {
          copy_pass(i, first, token, feature);
          continue;
        }
        const Piece of = piece(token, feature);
#pragma unroll 1
        for (int c = 0; c < chunks; ++c) write_chunk(of, first + c, c, 0);
      }
    }
  }

  __device__ __forceinline__ bool copies_out() const { return equal_passes(kTile, Consumer::kSmem) && args.copies_out; }
  // The warps take turns to ask for copies: the queue of copies is short, and who asks for several waits until the first have left.
  static __device__ __forceinline__ bool asks_for(int pass) {
    constexpr int kWarps = kWarpgroupThreads / format::kLanes;
    static_assert(kSlots <= kWarps);
    return threadIdx.x % format::kLanes == 0 && threadIdx.x / format::kLanes % kWarps == pass % kWarps;
  }
  __device__ __forceinline__ void copy_pass(int pass, int chunk, int token, int feature) const {
    if (!asks_for(pass)) return;
    ptx::tensor_store(&args.out_map, feature, token, staging + chunk * kStagedBytes);
    ptx::bulk_commit();
  }
  // Until the copy of a pass has read what was staged; its thread has asked for none since.
  static __device__ __forceinline__ void wait_copied(int pass) {
    if (asks_for(pass)) ptx::bulk_wait_read();
  }
  static __device__ __forceinline__ void wait_copied() {
    if (threadIdx.x % format::kLanes == 0) ptx::bulk_wait_read();
  }
  // Shared memory must outlive the copies that read it.
  __device__ __forceinline__ void finish() const {
    if (copies_out()) wait_copied();
  }

  // Of a tile whose sums are exchanged, the chunks that this block owns and the team finishes; it has no other tile. What can be worked out
  // before the others' sums are there is.
  template <int kTeam, typename Exchange>
  __device__ __forceinline__ void store_owned(const Exchange& exchange, const Sums& sums, const BlockWork& work,
                                              int feature0) const {
    constexpr int kRoom = kSlots * kPassChunks, kMostOwned = (Exchange::kChunks + 1) / 2;
    static_assert(kTile.teams == 1 || kRoom >= Exchange::kChunks);
    RowTerms terms[Consumer::kPanels];
#pragma unroll
    for (int b = 0; b < Consumer::kPanels; ++b) terms[b] = row_terms(feature0 + b * format::kTileRows);
    const int rank = exchange.consumer.split();
    uint32_t stage_at = stage_place();
    Piece of = piece(work.tile_m * kTile.block_m, feature0);
    asm volatile("" : "+r"(stage_at), "+r"(of.from), "+l"(of.out), "+r"(of.tokens), "+r"(of.features));
    if (exchange.splits > 1) exchange.wait();
    const auto write = [&](int first, int count) {  // so many of the block's chunks, from the first-th on
      sync();
#pragma unroll 1
      for (int i = kTeam; i < count; i += kTile.teams) {
        const int c = rank + (first + i) * exchange.splits;
        write_chunk(of, i, c % Exchange::kPanelChunks, c / Exchange::kPanelChunks);
      }
    };
    int owned = 0, written = 0;
    Exchange::for_each_chunk(exchange.splits, [&](int c, int owner, int i) {
      if (owner != rank) return;
      if (kRoom < kMostOwned && owned - written == kRoom) {
        write(written, kRoom);
        written = owned;
        sync();  // read, before it is overwritten
      }
      ++owned;
      if (!Exchange::has(kTeam, i)) return;
      float total[kChunkSums];
      exchange.add(total, sums, c, i);
      stage_chunk(stage_at, total, terms[c / Exchange::kPanelChunks], i - written);
    });
    write(written, owned - written);
  }

  // Where this thread names a row of the first chunk staged.
  __device__ __forceinline__ uint32_t stage_place() const {
    const int warp = threadIdx.x / format::kLanes % format::kTileSlices, lane = threadIdx.x % format::kLanes;
    return staging + place(lane / 16 * kMmaTokens + lane % 8, 2 * warp + lane / 8 % 2);
  }
  // 16 tokens, to the chunk-th 16 rows of the staging bytes.
  __device__ __forceinline__ void stage_chunk(uint32_t at, const float* sums, const RowTerms& t, int chunk) const {
    uint32_t v[4];
#pragma unroll
    for (int x = 0; x < 4; ++x) {  // x % 2: rows g or g + 8, x / 2: block of 8 tokens
      const float* two = sums + kBlockSums * (x / 2) + 2 * (x % 2);
      v[x] = pack_pair<Act>(two[0] * t.scale[x % 2] + t.bias[x % 2], two[1] * t.scale[x % 2] + t.bias[x % 2]);
    }
    ptx::stmatrix_x4_trans(at + chunk * kStagedBytes, v);
  }

  // 16-byte piece `piece` of a token's 64 features, swizzled as the tensor copy reads it.
  static __device__ __forceinline__ uint32_t place(int token, int piece) {
    return token * kSwizzleRowBytes + ((piece ^ token % 8) << 4);
  }

  // 16 bytes of a token, which this thread writes of every chunk: of the first one of a tile,
  struct Piece {
    uint32_t from;  // where they are staged,
    uint16_t* out;  // and where they go;
    int tokens;     // tokens and features that exist from there on
    int features;
  };
  __device__ __forceinline__ Piece piece(int token0, int feature0) const {
    const KernelArgs& g = args.gemm;
    const int thread = threadIdx.x % kWarpgroupThreads, row = thread / kRowPieces, column = thread % kRowPieces;
    const int token = token0 + row, feature = feature0 + column * kPieceValues;
    return {staging + place(row, column),
            static_cast<uint16_t*>(g.params.out) + static_cast<int64_t>(token) * g.n + feature, g.m - token,
            g.n - feature};
  }
  // The `staged`-th 16 staged rows, to the tile's chunk of tokens and panel of features.
  __device__ __forceinline__ void write_chunk(const Piece& of, int staged, int chunk, int panel) const {
    const int token = chunk * kChunkTokens, features = of.features - panel * format::kTileRows;
    if (token >= of.tokens || features <= 0) return;
    const int n = args.gemm.n;
    const uint4 v = ptx::load_shared_v4(of.from + staged * kStagedBytes);
    uint16_t* const out = of.out + static_cast<int64_t>(token) * n + panel * format::kTileRows;
    if (n % kPieceValues == 0) {
      *reinterpret_cast<uint4*>(out) = v;
    } else {
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < kPieceValues; ++i)
        if (i < features) out[i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    }
  }
};

}  // namespace sparse_marlin::device
