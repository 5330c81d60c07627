// The main loop of one team of warps. Sparse operands exist only on the MMA's left side, so a warp computes rows = out features,
// columns = tokens. Warp (wm, wn) of the warps_m x warps_n of a team owns features wn * warp_n .. and tokens wm * warp_m ...
//
// Scales of groups. With few tokens the codes go into the MMA as they are, exactly, and the scale multiplies the group's float32
// sums: kTokenBlocks * 4 multiplications a slice and group. With more tokens it multiplies the 16-bit weights: 4 a slice and step.
#pragma once
#include "device/copies.cuh"
#include "device/dequant.cuh"
#include "device/kernel_args.h"
#include "device/ptx/mma_sp.cuh"
#include "plan/scale_mode.h"
#include "plan/smem.h"

namespace sparse_marlin::device {

template <typename Act, int kBits, Tile kTile, ScaleMode kMode>
struct Mainloop {
  static constexpr int kSlices = kTile.warp_n() / format::kSliceRows;  // of one warp
  static constexpr int kTokenBlocks = kTile.warp_m() / kMmaTokens;     // of one warp
  static constexpr int kSliceBytes = format::slice_bytes(kBits);
  static constexpr int kPlanes = kBits / 4;  // 16-byte words of codes a lane and slice
  static constexpr bool kScaled = kMode != ScaleMode::kNone;
  static constexpr bool kScaleSums = kScaled && kSlices * kTokenBlocks <= 4;  // more would not fit the registers
  static constexpr bool kAllRows = kTile.block_m > kPartialRows;  // shared memory holds every token of the block
  using Copy = Copies<kBits, kTile>;
  using Codes = Dequant<Act, kBits>;

  struct Sums {
    ptx::FragD d[kSlices][kTokenBlocks];
  };
  struct WarpPlace {
    int lane;
    int row0;    // first feature of the warp in the block
    int token0;  // first token of the warp in the block
  };
  using Weights = ptx::FragA[kSlices];
  struct Scales {            // as stored, in the low half
    uint32_t low[kSlices];   // row g
    uint32_t high[kSlices];  // row g + 8
  };
  struct Places {  // of this lane, bytes from the start of a stage
    uint32_t codes;
    uint32_t meta;
    uint32_t scales;
    uint32_t tokens[kTokenBlocks];
  };
  struct Tiles {  // of one column tile and warp, in registers
    uint4 codes[kSlices][kPlanes];
    uint2 meta[kSlices];
  };

  const KernelArgs& args;
  Copy& copies;
  const uint32_t ring;  // shared-memory address of the team's ring
  const int rows_of_scales;
  const WarpPlace warp;
  const int team;

  // All copies but the newest `pending` groups have arrived. The instruction takes a constant; a switch would become a jump table.
  static __device__ __forceinline__ void wait_copies(int pending) {
    static_assert(kMaxStages - 2 == 3);
    if (pending == 1) {
      ptx::cp_async_wait<1>();
    } else if (pending == 2) {
      ptx::cp_async_wait<2>();
    } else if (pending == 0) {
      ptx::cp_async_wait<0>();
    } else {
      ptx::cp_async_wait<3>();
    }
  }
  __device__ __forceinline__ void team_sync() const {
    if constexpr (kTile.team_warps() == 1) {
      __syncwarp();
    } else if constexpr (kTile.warps_k == 1) {
      __syncthreads();
    } else {
      ptx::named_barrier(1 + team, kTile.team_threads());
    }
  }

  __device__ __forceinline__ Tiles load_tiles(uint32_t stage, const Places& places) const {
    Tiles t;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      constexpr int kCodeBytes = format::slice_code_words(kBits) * format::kWordBytes;
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        t.codes[s][p] =
            ptx::load_shared_v4(stage + places.codes + s * kSliceBytes + p * format::kLanes * int{sizeof(uint4)});
      }
      t.meta[s] = ptx::load_shared_v2(stage + places.meta + s * kSliceBytes + kCodeBytes);
    }
    return t;
  }

  static __device__ __forceinline__ ptx::FragA dequantize(const uint4 (&codes)[kPlanes], int step) {
    if constexpr (kBits == 4) {
      const uint4& v = codes[0];
      const uint32_t words[1] = {step == 0 ? v.x : step == 1 ? v.y : step == 2 ? v.z : v.w};
      return Codes::run(words);
    } else {
      const uint4& v = codes[step / 2];
      const uint32_t words[2] = {step % 2 == 0 ? v.x : v.z, step % 2 == 0 ? v.y : v.w};
      return Codes::run(words);
    }
  }

  // The lane's two scales of every slice for the group that holds `step`, as stored.
  __device__ __forceinline__ void load_scales(Scales& scales, uint32_t stage, const Places& places, int step) const {
    const int row = kMode == ScaleMode::kTiles ? 0 : rows_of_scales * step / format::kSliceSteps;
    const uint32_t at = stage + places.scales + row * kTile.block_n * kActBytes;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      scales.low[s] = ptx::load_shared_16(at + s * format::kSliceRows * kActBytes);
      scales.high[s] = ptx::load_shared_16(at + (s * format::kSliceRows + format::kHalfRows) * kActBytes);
    }
  }

  static __device__ __forceinline__ void add_scaled(Sums& sums, const Sums& group, const Scales& scales) {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      const float a = Pair<Act>::to_float(scales.low[s]), b = Pair<Act>::to_float(scales.high[s]);
#pragma unroll
      for (int q = 0; q < kTokenBlocks; ++q) {
        float(&to)[4] = sums.d[s][q].reg;
        const float(&from)[4] = group.d[s][q].reg;
        to[0] += a * from[0];
        to[1] += a * from[1];
        to[2] += b * from[2];
        to[3] += b * from[3];
      }
    }
  }

  // Activations go from shared memory to registers a chunk of token blocks ahead of the MMAs that use them.
  static constexpr int kChunkBlocks = kTokenBlocks > 1 ? kTokenBlocks / 2 : 1;
  static constexpr int kStepChunks = kTokenBlocks / kChunkBlocks;
  static constexpr int kChunks = kStepChunks * format::kSliceSteps;
  using Chunk = ptx::FragB[kChunkBlocks];

  __device__ __forceinline__ void load_chunk(Chunk& x, const uint32_t (&token_at)[kTokenBlocks], int chunk) const {
    // chunk 4 step + j of a row lies at 16 * ((4 step + j) ^ swizzle) = 64 step ^ 16 * (j ^ swizzle)
    const int step_bytes = chunk / kStepChunks * (kActRowBytes / format::kSliceSteps);
#pragma unroll
    for (int i = 0; i < kChunkBlocks; ++i) {
      const int q = chunk % kStepChunks * kChunkBlocks + i;
      x[i] = kAllRows ? ptx::ldmatrix_x4((token_at[0] ^ step_bytes) + q * kMmaTokens * kActRowBytes)
                      : ptx::ldmatrix_x4(token_at[q] ^ step_bytes);
    }
  }

  __device__ __forceinline__ void mma_block(Sums& sums, const Weights& w, const Tiles& t, const ptx::FragB& x, int step,
                                            int q) const {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      // here problem space becomes instruction space: weights are the sparse operand a, activations are b
      const uint32_t e = step < 2 ? t.meta[s].x : t.meta[s].y;
      if (step % 2 == 0) {
        ptx::mma_sp<Act, 0>(sums.d[s][q], w[s], x, e);
      } else {
        ptx::mma_sp<Act, 1>(sums.d[s][q], w[s], x, e);
      }
    }
  }

  __device__ __forceinline__ void dequantize_slice(Weights& w, const Tiles& t, const Scales& scales, int step,
                                                   int s) const {
    w[s] = dequantize(t.codes[s], step);
    if (kScaled && !kScaleSums) {
      apply_scales<Act>(w[s], {Pair<Act>::broadcast(scales.low[s]), Pair<Act>::broadcast(scales.high[s])});
    }
  }

  // One column tile, in `stage`; meanwhile another is sent to `fill` (unless there is none left), part by part, and the weights of
  // the next step are dequantized between the MMAs of this one: the tensor cores take 8 cycles for an MMA, time for a few others.
  __device__ __forceinline__ void multiply(Sums& sums, const Places& places, uint32_t stage, uint32_t fill,
                                           bool more) const {
    const Tiles t = load_tiles(stage, places);
    Scales scales;
    if (kScaled) load_scales(scales, stage, places, 0);
    uint32_t token_at[kTokenBlocks];
#pragma unroll
    for (int q = 0; q < kTokenBlocks; ++q) token_at[q] = stage + places.tokens[q];
    Sums group = {};
    Chunk x[2];
    load_chunk(x[0], token_at, 0);
    Weights w[2];
#pragma unroll
    for (int s = 0; s < kSlices; ++s) dequantize_slice(w[0], t, scales, 0, s);
#pragma unroll
    for (int step = 0; step < format::kSliceSteps; ++step) {
      constexpr bool kNewGroups = kMode == ScaleMode::kSteps;
      if (kNewGroups && kScaleSums && step > 0) {
        add_scaled(sums, group, scales);
        group = {};
        load_scales(scales, stage, places, step);
      }
      if (kNewGroups && !kScaleSums && step + 1 < format::kSliceSteps) load_scales(scales, stage, places, step + 1);
      if (more) copies.copy_part(fill, step);
#pragma unroll
      for (int q = 0; q < kTokenBlocks; ++q) {
        const int chunk = step * kStepChunks + q / kChunkBlocks;
        if (q % kChunkBlocks == 0 && chunk + 1 < kChunks) load_chunk(x[(chunk + 1) % 2], token_at, chunk + 1);
        mma_block(kScaleSums ? group : sums, w[step % 2], t, x[chunk % 2][q % kChunkBlocks], step, q);
        if (step + 1 < format::kSliceSteps) {
#pragma unroll
          for (int s = q * kSlices / kTokenBlocks; s < (q + 1) * kSlices / kTokenBlocks; ++s) {
            dequantize_slice(w[(step + 1) % 2], t, scales, step + 1, s);
          }
        }
      }
    }
    if (kScaleSums) add_scaled(sums, group, scales);
  }

  // `count` column tiles; no team of the block has more than `most`, none fewer than one less.
  __device__ __forceinline__ void run(Sums& sums, int count, int most) const {
    const int ahead = args.num_stages - 1, size = stage_bytes(kTile, kBits, args.act_rows, args.group_size);
    const uint32_t end = ring + args.num_stages * size;
    uint32_t stage = ring, fill = ring;
    for (int i = 0; i < ahead; ++i, fill += size) {
      if (i < count) copies.copy_stage(fill);
      ptx::cp_async_commit();
    }
    const Places places = lane_places();
    for (int i = 0; i < count; ++i) {
      wait_copies(ahead - 1);
      team_sync();  // copies of all threads are visible, and everybody has left the stage that is filled next
      multiply(sums, places, stage, fill, i + ahead < count);
      ptx::cp_async_commit();
      stage = stage + size == end ? ring : stage + size;
      fill = fill + size == end ? ring : fill + size;
    }
    // Every warp passes equally many barriers: where teams differ, racecheck of compute-sanitizer 2025.3 reports hazards between
    // them across the __syncthreads of the epilogue.
    if constexpr (kTile.team_warps() > 1 && kTile.warps_k > 1) {
      if (count < most) team_sync();
    }
    ptx::cp_async_wait<0>();
  }

  __device__ __forceinline__ Places lane_places() const {
    Places p;
    const uint32_t weights = warp.row0 / format::kSliceRows * kSliceBytes;
    p.codes = weights + warp.lane * int{sizeof(uint4)};
    p.meta = weights + warp.lane * int{sizeof(uint2)};
    p.scales = copies.scales_at(0) + (warp.row0 + warp.lane / format::kLanesPerRow) * kActBytes;
#pragma unroll
    for (int q = 0; q < kTokenBlocks; ++q) {
      int token = warp.token0 + q * kMmaTokens + warp.lane % Copy::kSwizzle;
      // tokens that are not kept have no row: read the last one again, the product is never stored
      if (!kAllRows) token = min(token, args.act_rows - 1);
      p.tokens[q] =
          Copy::acts_at(0) + token * kActRowBytes + ((warp.lane / kMmaTokens) ^ (token % Copy::kSwizzle)) * kCopyBytes;
    }
    // keep them: the compiler would work them out again for every tile
    asm volatile("" : "+r"(p.codes), "+r"(p.meta), "+r"(p.scales), "+r"(p.tokens[0]));
    return p;
  }
};

}  // namespace sparse_marlin::device
