// Sums of the teams -> output. The accumulators hold features x tokens and the output is tokens x features, so the store is a
// transposition through shared memory, where the teams' float32 sums are added in a fixed order; then channel scale, bias, one
// rounding. With several splits the sum goes to the workspace in float32, and reduce_splits finishes.
#pragma once
#include "device/kernel_args.h"
#include "device/mainloop_sm80.cuh"
#include "device/scheduler.cuh"
#include "device/store_out.cuh"

namespace sparse_marlin::device {

__device__ __forceinline__ void store_partial(float* out, float4 v, int count, bool aligned) {
  if (aligned && count >= kVector) {
    *reinterpret_cast<float4*>(out) = v;
  } else {
    const float values[kVector] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      if (j < count) out[j] = values[j];
  }
}

template <typename Act, typename Loop, Tile kTile>
struct Epilogue {
  static constexpr int kPassBlocks = epilogue_blocks(kTile);  // 8-token blocks of a warp and pass
  static constexpr int kPasses = Loop::kTokenBlocks / kPassBlocks;
  static constexpr int kPassTokens = epilogue_tokens(kTile);  // of the block and pass
  static constexpr int kPitch = kTile.block_n + kEpiloguePad;
  static_assert(Loop::kTokenBlocks % kPassBlocks == 0);

  // Hands the sums of token blocks pass * kPassBlocks .. to shared memory: [team][token][feature].
  static __device__ __forceinline__ void share(const typename Loop::Sums& sums, float* shared, int pass, int team,
                                               int warp_m, int row0, int lane) {
    const int g = lane / format::kLanesPerRow, c = lane % format::kLanesPerRow;
#pragma unroll
    for (int b = 0; b < kPassBlocks; ++b) {
      float* token =
          shared + (team * kPassTokens + (warp_m * kPassBlocks + b) * kMmaTokens + 2 * c) * kPitch + row0 + g;
#pragma unroll
      for (int s = 0; s < Loop::kSlices; ++s) {
        ptx::FragD d;
#pragma unroll
        for (int p = 0; p < kPasses; ++p)  // a constant index for every pass keeps the accumulators in registers
          if (p == pass) d = sums.d[s][p * kPassBlocks + b];
        float* at = token + s * format::kSliceRows;
        at[0] = d.reg[0];
        at[kPitch] = d.reg[1];
        at[format::kHalfRows] = d.reg[2];
        at[kPitch + format::kHalfRows] = d.reg[3];
      }
    }
  }

  static __device__ __forceinline__ void store(const KernelArgs& args, const BlockWork& work, const float* shared,
                                               int pass) {
    constexpr int kRowThreads = kTile.block_n / kVector;
    const bool aligned = args.n % kVector == 0;
    for (int i = threadIdx.x; i < kPassTokens * kRowThreads; i += kTile.threads()) {
      const int row = i / kRowThreads, feature = i % kRowThreads * kVector;
      const int warp_m = row / (kPassBlocks * kMmaTokens), in_warp = row % (kPassBlocks * kMmaTokens);
      const int token =
          work.tile_m * kTile.block_m + warp_m * kTile.warp_m() + pass * kPassBlocks * kMmaTokens + in_warp;
      const int n = work.tile_n * kTile.block_n + feature;
      if (token >= args.m || n >= args.n) continue;
      const int count = min(kVector, args.n - n);
      float4 v = *reinterpret_cast<const float4*>(shared + row * kPitch + feature);
#pragma unroll
      for (int t = 1; t < kTile.warps_k; ++t) {
        const float4 u = *reinterpret_cast<const float4*>(shared + (t * kPassTokens + row) * kPitch + feature);
        v.x += u.x;
        v.y += u.y;
        v.z += u.z;
        v.w += u.w;
      }
      if (args.group_size == kChannelwise) {
        const Act* scales = static_cast<const Act*>(args.params.scales) + n;
        v.x *= to_float(scales[0]);
        if (count > 1) v.y *= to_float(scales[1]);
        if (count > 2) v.z *= to_float(scales[2]);
        if (count > 3) v.w *= to_float(scales[3]);
      }
      const int64_t at = static_cast<int64_t>(token) * args.n + n;
      if (args.splits > 1) {
        store_partial(args.partials + static_cast<int64_t>(work.split) * args.m * args.n + at, v, count, aligned);
      } else {
        const Act* bias = static_cast<const Act*>(args.params.bias);
        store_out(static_cast<Act*>(args.params.out) + at, bias == nullptr ? nullptr : bias + n, v, count, aligned);
      }
    }
  }
};

}  // namespace sparse_marlin::device
