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
#include "plan/smem.h"

namespace sparse_marlin::device {

// How often a group of scales ends: after whole tiles (group sizes 128 and 256; channelwise is scaled in the epilogue) or after
// steps inside a tile (32, 64).
enum class ScaleMode : int { kTiles, kSteps };

template <typename Act, int kBits, Tile kTile, ScaleMode kMode>
struct Mainloop {
  static constexpr int kSlices = kTile.warp_n() / format::kSliceRows;  // of one warp
  static constexpr int kTokenBlocks = kTile.warp_m() / kMmaTokens;     // of one warp
  static constexpr int kSliceBytes = format::slice_bytes(kBits);
  static constexpr int kPlanes = kBits / 4;                            // 16-byte words of codes a lane and slice
  static constexpr bool kScaleSums = kSlices * kTokenBlocks <= 4;  // more would not fit the registers
  static constexpr bool kAllRows = kTile.block_m > kPartialRows;       // shared memory holds every token of the block
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
  struct Tiles {  // of one column tile and warp, in registers
    uint4 codes[kSlices][kPlanes];
    uint2 meta[kSlices];
  };

  const KernelArgs& args;
  Copy& copies;
  const uint32_t ring;    // shared-memory address of the team's ring
  const int rows_of_scales;
  const WarpPlace warp;
  const int team;

  // All copies but the newest `pending` groups have arrived. The instruction takes a constant.
  static __device__ __forceinline__ void wait_copies(int pending) {
    switch (pending) {
      case 0: ptx::cp_async_wait<0>(); break;
      case 1: ptx::cp_async_wait<1>(); break;
      case 2: ptx::cp_async_wait<2>(); break;
      case 3: ptx::cp_async_wait<3>(); break;
      case 4: ptx::cp_async_wait<4>(); break;
      case 5: ptx::cp_async_wait<5>(); break;
      default: ptx::cp_async_wait<kMaxStages - 2>(); break;
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

  __device__ __forceinline__ Tiles load_tiles(uint32_t stage) const {
    Tiles t;
    const uint32_t at = stage + warp.row0 / format::kSliceRows * kSliceBytes;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        t.codes[s][p] = ptx::load_shared_v4(at + s * kSliceBytes + (p * format::kLanes + warp.lane) * int{sizeof(uint4)});
      }
      t.meta[s] = ptx::load_shared_v2(at + s * kSliceBytes + format::slice_code_words(kBits) * format::kWordBytes +
                                      warp.lane * int{sizeof(uint2)});
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
  __device__ __forceinline__ void load_scales(uint32_t (&low)[kSlices], uint32_t (&high)[kSlices], uint32_t stage, int step) const {
    const int row = kMode == ScaleMode::kTiles ? 0 : rows_of_scales * step / format::kSliceSteps;
    const uint32_t at =
        copies.scales_at(stage) + (row * kTile.block_n + warp.row0 + warp.lane / format::kLanesPerRow) * kActBytes;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      low[s] = ptx::load_shared_16(at + s * format::kSliceRows * kActBytes);
      high[s] = ptx::load_shared_16(at + (s * format::kSliceRows + format::kHalfRows) * kActBytes);
    }
  }

  static __device__ __forceinline__ void add_scaled(Sums& sums, const Sums& group, const uint32_t (&low)[kSlices],
                                                    const uint32_t (&high)[kSlices]) {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      const float a = Pair<Act>::to_float(low[s]), b = Pair<Act>::to_float(high[s]);
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

  // One step: kSlices x kTokenBlocks MMAs.
  __device__ __forceinline__ void step_mma(Sums& sums, const ptx::FragA (&w)[kSlices], const Tiles& t,
                                           const uint32_t (&token_at)[kTokenBlocks], int step) const {
#pragma unroll
    for (int q = 0; q < kTokenBlocks; ++q) {
      // chunk 4 step + j of a row lies at 16 * ((4 step + j) ^ swizzle) = 64 step ^ 16 * (j ^ swizzle)
      constexpr int kStepBytes = kActRowBytes / format::kSliceSteps;
      const ptx::FragB x = kAllRows ? ptx::ldmatrix_x4((token_at[0] ^ (step * kStepBytes)) + q * kMmaTokens * kActRowBytes)
                                    : ptx::ldmatrix_x4(token_at[q] ^ (step * kStepBytes));
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
  }

  // One column tile, in `stage`; meanwhile another is sent to `fill` (unless there is none left), part by part.
  __device__ __forceinline__ void multiply(Sums& sums, const uint32_t (&token_offset)[kTokenBlocks], uint32_t stage, uint32_t fill,
                                           bool more) const {
    const Tiles t = load_tiles(stage);
    uint32_t low[kSlices], high[kSlices];
    if (kMode == ScaleMode::kSteps || rows_of_scales != 0) {
      load_scales(low, high, stage, 0);
    } else {  // channelwise: the epilogue scales
#pragma unroll
      for (int s = 0; s < kSlices; ++s) low[s] = high[s] = Pair<Act>::kOne & 0xffff;
    }
    uint32_t token_at[kTokenBlocks];
#pragma unroll
    for (int q = 0; q < kTokenBlocks; ++q) token_at[q] = Copy::acts_at(stage) + token_offset[q];
    Sums group = {};
#pragma unroll
    for (int step = 0; step < format::kSliceSteps; ++step) {
      if (kMode == ScaleMode::kSteps && step > 0) {
        if (kScaleSums) {
          add_scaled(sums, group, low, high);
          group = {};
        }
        load_scales(low, high, stage, step);
      }
      ptx::FragA w[kSlices];
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        w[s] = dequantize(t.codes[s], step);
        if (!kScaleSums) apply_scales<Act>(w[s], {Pair<Act>::broadcast(low[s]), Pair<Act>::broadcast(high[s])});
      }
      if (more) copies.copy_part(fill, step);
      step_mma(kScaleSums ? group : sums, w, t, token_at, step);
    }
    if (kScaleSums) add_scaled(sums, group, low, high);
  }

  // `count` column tiles.
  __device__ __forceinline__ void run(Sums& sums, int count) const {
    const int ahead = args.num_stages - 1, size = stage_bytes(kTile, kBits, args.act_rows, args.group_size);
    const uint32_t end = ring + args.num_stages * size;
    uint32_t stage = ring, fill = ring;
    for (int i = 0; i < ahead; ++i, fill += size) {
      if (i < count) copies.copy_stage(fill);
      ptx::cp_async_commit();
    }
    uint32_t token_offset[kTokenBlocks];
#pragma unroll
    for (int q = 0; q < kTokenBlocks; ++q) {
      int token = warp.token0 + q * kMmaTokens + warp.lane % Copy::kSwizzle;
      // tokens that are not kept have no row: read the last one again, the product is never stored
      if (!kAllRows) token = min(token, args.act_rows - 1);
      token_offset[q] = token * kActRowBytes + ((warp.lane / kMmaTokens) ^ (token % Copy::kSwizzle)) * kCopyBytes;
    }
    for (int i = 0; i < count; ++i) {
      wait_copies(ahead - 1);
      team_sync();  // copies of all threads are visible, and everybody has left the stage that is filled next
      multiply(sums, token_offset, stage, fill, i + ahead < count);
      ptx::cp_async_commit();
      stage = stage + size == end ? ring : stage + size;
      fill = fill + size == end ? ring : fill + size;
    }
    ptx::cp_async_wait<0>();
  }
};

}  // namespace sparse_marlin::device
