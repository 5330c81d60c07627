// How a team of warps brings 128-column tiles of weights, activations and scales into the stages of its ring: asynchronous 16-byte
// copies. In the main loop every instruction competes with the tensor cores for issue slots, so pointers are carried from tile to
// tile and a stage is brought in four parts, one between two steps of MMAs.
//
//   stage   weights [slice][codes | metadata]       as in the packed tensor
//           acts    [token][16 chunks of 16 B], chunk c of token t stored at c ^ (t % 8): the 8 rows of an ldmatrix then lie in
//                   8 different 16-byte columns of the banks
//           scales  [group of the tile][block_n]
#pragma once
#include "device/kernel_args.h"
#include "device/ptx/cp_async.cuh"
#include "device/ptx/dependent_launch.cuh"
#include "device/scheduler.cuh"
#include "plan/smem.h"

namespace sparse_marlin::device {

template <int kBits, Tile kTile>
struct Copies {
  static constexpr int kThreads = kTile.team_threads();
  static constexpr int kStride = kTile.warps_k;  // the team's column tiles are first, first + kStride, ...
  static constexpr int kParts = format::kSliceSteps;
  static constexpr int kWeightBytes = weight_stage_bytes(kTile, kBits);
  static constexpr int kSwizzle = 8;

  // weights: `run` = rows that lie together in the packed tensor
  static constexpr int kRunRows = kTile.block_n < format::kTileRows ? kTile.block_n : format::kTileRows;
  static constexpr int kRunChunks = kRunRows / format::kSliceRows * format::slice_bytes(kBits) / kCopyBytes;
  static constexpr int kWeightChunks = kWeightBytes / kCopyBytes;
  static constexpr int kWeightTurns = (kWeightChunks + kThreads - 1) / kThreads;
  static constexpr bool kOneRun = kWeightChunks == kRunChunks;
  // activations: a thread keeps its chunk of the row and walks over tokens
  static constexpr int kRowChunks = kActRowBytes / kCopyBytes;
  static constexpr int kTurnTokens = kThreads / kRowChunks;
  static constexpr int kActTurns = (kTile.block_m + kTurnTokens - 1) / kTurnTokens;
  static constexpr int kChunkActs = kCopyBytes / kActBytes;
  static constexpr int kScaleChunks = kTile.block_n / kChunkActs;
  static_assert(kThreads % kRowChunks == 0);
  static_assert(kScaleChunks * scale_rows(32) <= kThreads, "one copy a thread brings the scales of a tile");

  const KernelArgs& args;
  const int thread;  // in the team
  const uint64_t policy;
  // carried from tile to tile
  const char* weights;  // the block's first slice
  const char* acts;     // this thread's first chunk
  int cols_left;        // columns from this thread's first one to the end
  int col_tile;
  // the same for every tile
  uint32_t weight_from[kWeightTurns];  // bytes after `weights`
  int64_t act_step;                    // bytes between the tokens of two turns
  int tokens_left;                     // tokens from this thread's first one to the end
  int scale_row;                       // group of the tile this thread copies, or -1
  int scale_feature;
  int rows_of_tiles;  // 64-row tiles from the block's first one to the end

  __device__ Copies(const KernelArgs& a, const BlockWork& work, int first_col_tile, int team_thread)
      : args(a),
        thread(team_thread),
        policy(a.tiles_m == 1 ? ptx::policy_evict_first() : ptx::policy_evict_normal()),
        col_tile(first_col_tile) {
    const int feature0 = work.tile_n * kTile.block_n;
    const int64_t row_bytes = a.params.weights_row_words * format::kWordBytes;
    const int first_tile = feature0 / format::kTileRows, last_tile = static_cast<int>(format::row_tiles(a.n)) - 1;
    rows_of_tiles = last_tile - first_tile + 1;
    weights = reinterpret_cast<const char*>(a.params.weights) + first_tile * row_bytes +
              feature0 % format::kTileRows / format::kSliceRows * format::slice_bytes(kBits) +
              static_cast<int64_t>(col_tile) * format::tile_bytes(kBits);
#pragma unroll
    for (int i = 0; i < kWeightTurns; ++i) {
      const int chunk = i * kThreads + thread, run = kOneRun ? 0 : chunk / kRunChunks;
      // rows past the end exist in no tile: read the last one again, their sums are never stored
      const int tile = min(run, last_tile - first_tile);
      weight_from[i] = static_cast<uint32_t>(tile * row_bytes) + (chunk - run * kRunChunks) * kCopyBytes;
      if (!kOneRun)
        asm volatile("" : "+r"(weight_from[i]));  // keep it: the compiler would work it out again for every tile
    }
    const int token = work.tile_m * kTile.block_m + thread / kRowChunks, col = thread % kRowChunks * kChunkActs;
    tokens_left = a.m - token;
    cols_left = a.k - col - col_tile * format::kTileCols;
    act_step = static_cast<int64_t>(kTurnTokens) * a.acts_row * kActBytes;
    acts = static_cast<const char*>(a.params.acts) + (static_cast<int64_t>(token) * a.acts_row + col) * kActBytes +
           static_cast<int64_t>(col_tile) * kActRowBytes;
    scale_row = thread < scale_rows(a.group_size) * kScaleChunks ? thread / kScaleChunks : -1;
    scale_feature = feature0 + thread % kScaleChunks * kChunkActs;
    if (scale_feature >= a.n) scale_row = -1;
  }

  static __device__ __forceinline__ uint32_t acts_at(uint32_t stage) { return stage + kWeightBytes; }
  __device__ __forceinline__ uint32_t scales_at(uint32_t stage) const {
    return acts_at(stage) + args.act_rows * kActRowBytes;
  }

  // Part `part` of the present column tile into `stage`. The last part moves on to the next tile.
  __device__ __forceinline__ void copy_part(uint32_t stage, int part) {
    const uint32_t weights_to = stage + thread * kCopyBytes;
#pragma unroll
    for (int i = 0; i < kWeightTurns; ++i) {
      if (i % kParts != part) continue;
      if (kWeightChunks % kThreads == 0 || i * kThreads + thread < kWeightChunks) {
        const uint32_t from = kOneRun ? weight_from[0] + i * kThreads * kCopyBytes : weight_from[i];
        ptx::cp_async_16(weights_to + i * kThreads * kCopyBytes, weights + from, policy);
      }
    }
    const int token0 = thread / kRowChunks, chunk = thread % kRowChunks;
    const uint32_t acts_to = acts_at(stage) + token0 * kActRowBytes;
    const char* from = acts + (part == 0 ? 0 : part * act_step);
#pragma unroll
    for (int i = 0; i < kActTurns; ++i) {
      if (i % kParts != part) continue;
      const int token = i * kTurnTokens;
      // tokens past the end are not loaded at all: a token's column of the product depends on that token alone
      if (token < tokens_left && (kTile.block_m % kTurnTokens == 0 || token0 + token < kTile.block_m)) {
        const int swizzle = (token0 + token) % kSwizzle;
        // columns past the end become zero: they meet code 0, and 0 * NaN would not be 0
        ptx::cp_async_16_or_zero(acts_to + token * kActRowBytes + (chunk ^ swizzle) * kCopyBytes, from, cols_left <= 0);
      }
      from += kParts * act_step;
    }
    if (part == 0) copy_scales(stage);
    if (part == kParts - 1) {
      weights += kStride * format::tile_bytes(kBits);
      acts += kStride * kActRowBytes;
      cols_left -= kStride * format::kTileCols;
      col_tile += kStride;
    }
  }

  // Weights of the first `stages` column tiles, of which `count` exist, into L2: they depend on no kernel before this one. One lane
  // a run of bytes.
  __device__ __forceinline__ void prefetch_weights(int stages, int count) const {
    constexpr int kRuns = kWeightChunks / kRunChunks;
    const int stage = thread / kRuns, run = thread % kRuns;
    if (stage >= min(stages, count)) return;
    const int64_t row_bytes = args.params.weights_row_words * format::kWordBytes;
    const int64_t tile = min(run, rows_of_tiles - 1) * row_bytes;
    ptx::prefetch_l2(weights + tile + stage * (kStride * format::tile_bytes(kBits)), kRunChunks * kCopyBytes);
  }

  __device__ __forceinline__ void copy_scales(uint32_t stage) const {
    if (scale_row < 0) return;
    // groups past the end scale code 0
    const int group = min((col_tile * format::kTileCols >> args.group_shift) + scale_row, args.num_groups - 1);
    const char* from = static_cast<const char*>(args.params.scales) +
                       (static_cast<int64_t>(group) * args.scales_row + scale_feature) * kActBytes;
    ptx::cp_async_16(scales_at(stage) + thread * kCopyBytes, from);
  }

  __device__ __forceinline__ void copy_stage(uint32_t stage) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) copy_part(stage, part);
  }
};

}  // namespace sparse_marlin::device
