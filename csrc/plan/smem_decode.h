// Shared memory of a block of the decode kernel, in bytes from a 1024-byte boundary: read by the planner and the launcher, which hands
// it to the kernel.
//   chunks    [chunk] of what a 128-column tile of every warp along k needs:
//             acts [half tile][token][64 columns], 128-byte swizzled
//             scales [group][block_n]
//   weights   [warp][stage][column tile of a turn] of { slices of packed weights }
//   exchange  [warp along k][token of 8][block_n + padding] float32: the sums
//   received  [split][vector that the block owns] float32: where splits > 1, the blocks' sums
//   up        the correction's second factor, [64 ranks][block_n][64], 128-byte swizzled; packed, [row tile][128-column tile] of
//             slices, then scales [group][block_n]
//   projected [token][rank + padding]: what the first factor makes of the activations, all tokens of the problem
//   barriers  weights full [warp][stage], then chunk full [chunk], then chunk empty [chunk], started, received, up full, projected full
#pragma once
#include <algorithm>

#include "plan/low_rank.h"
#include "plan/scale_mode.h"
#include "plan/smem_sm90.h"
#include "plan/tiles_decode.h"

namespace sparse_marlin {

inline constexpr int kMaxStagesDecode = 6;
inline constexpr int kMinStagesDecode = 2;
inline constexpr int kDecodeColMultiple =
    kHalfCols;  // activations are copied by 64 columns; k must be a multiple of it

// Groups of a chunk.
constexpr int chunk_scale_rows(const TileDecode& t, int group_size) {
  return group_size == kChannelwise ? 0 : std::max(1, t.warps_k * format::kTileCols / group_size);
}

constexpr int stage_bytes(const TileDecode& t, int num_bits) {
  return t.turn_cols * t.slices * format::slice_bytes(num_bits);
}
// What a warp does of k, in turns; column tiles past the end are zero activations.
constexpr int turns(const TileDecode& t, int64_t k, int splits) {
  const int cols = t.warps_k * t.turn_cols * splits;
  return static_cast<int>((format::col_tiles(k) + cols - 1) / cols);
}

struct SmemDecode {
  int rows;          // tokens that exist
  int copied_bytes;  // of a chunk, by its two copies
  int scales;        // offset in a chunk
  int chunk_bytes;
  int chunks;
  int stages;
  int weights;  // offsets
  int exchange;
  int received;  // where splits > 1
  int owned;     // vectors of a split there
  int weights_full;
  int chunk_full;
  int chunk_empty;
  int started;
  int received_full;
  int up;  // where there is a low-rank correction
  int projected;
  int up_full;
  int projected_full;
  int size;  // with room to align the start
};

// Four features of a token stay together; where k is split, vector i of the tile belongs to block i % splits.
inline constexpr int kVectorFeatures = 4;
inline constexpr int kVectorBytes = kVectorFeatures * static_cast<int>(sizeof(float));

constexpr int up_boxes(int rank) { return (rank + kUpBoxRanks - 1) / kUpBoxRanks; }
inline constexpr int kBoxAlign = 128;  // where a tensor copy that is not swizzled may put a box
// Of a packed `up`: bytes of a block's codes, and groups.
constexpr int tail_code_bytes(const TileDecode& t, int num_bits, int tail) {
  return tail * (t.block_n() / format::kSliceRows) * format::slice_bytes(num_bits);
}
constexpr int tail_groups(int tail, int group_size) {
  return static_cast<int>(num_groups(int64_t{tail} * format::kTileCols, group_size));
}
constexpr int up_bytes(const TileDecode& t, const Problem& p, const Correction& correction) {
  const int tail = correction.tail();
  if (tail == 0) return up_boxes(correction.rank) * t.block_n() * kSwizzleRowBytes;
  return tail_code_bytes(t, p.num_bits, tail) + tail_groups(tail, p.group_size) * t.block_n() * kActBytes;
}

constexpr SmemDecode smem_decode(const TileDecode& t, const Problem& p, int splits, int stages, int chunks,
                                 const Correction& correction = {}) {
  const int rank = correction.rank;
  SmemDecode s{};
  s.rows = static_cast<int>(std::min<int64_t>(p.m, t.block_m));
  const int acts = t.warps_k * kHalves * s.rows * kSwizzleRowBytes;
  const int scales = chunk_scale_rows(t, p.group_size) * t.block_n() * kActBytes;
  s.copied_bytes = acts + scales;
  s.scales = acts;
  s.chunk_bytes = round_up(acts + scales, kSwizzleAlign);
  s.chunks = chunks;
  s.stages = stages;
  s.weights = chunks * s.chunk_bytes;
  s.exchange = s.weights + t.warps() * stages * stage_bytes(t, p.num_bits);
  const int sums = t.warps_k * std::min(s.rows, kMmaTokens) * (t.block_n() + kEpiloguePad);
  s.received = s.exchange + sums * static_cast<int>(sizeof(float));
  s.owned = (s.rows * t.block_n() / kVectorFeatures + splits - 1) / splits;  // of block 0, the most
  const int received = splits > 1 ? splits * s.owned * kVectorBytes : 0;
  s.up = s.received + received;
  if (rank > 0) s.up = round_up(s.up, correction.packed ? kBoxAlign : kSwizzleAlign);
  s.projected = s.up + up_bytes(t, p, correction);
  s.weights_full = s.projected + (rank > 0 ? static_cast<int>(p.m) * projected_pitch(rank) * kActBytes : 0);
  s.chunk_full = s.weights_full + t.warps() * stages * kBarrierBytes;
  s.chunk_empty = s.chunk_full + chunks * kBarrierBytes;
  s.started = s.chunk_empty + chunks * kBarrierBytes;
  s.received_full = s.started + kBarrierBytes;
  s.up_full = s.received_full + kBarrierBytes;
  s.projected_full = s.up_full + kBarrierBytes;
  s.size = (rank > 0 ? s.projected_full : s.received_full) + kBarrierBytes + kSwizzleAlign;
  return s;
}

// The layout that fits `room` bytes: the rings of weights and of chunks hold the same number of turns, as many as a warp has use for;
// then as many stages more as there is room for. stages == 0 where nothing fits.
constexpr SmemDecode fitting_smem_decode(const TileDecode& t, const Problem& p, int splits, bool walks, int room,
                                         const Correction& correction = {}) {
  const int needed = turns(t, p.k, splits);
  const int most = walks ? kMaxStagesDecode : std::clamp(needed, kMinStagesDecode, kMaxStagesDecode);
  for (int depth = most; depth >= kMinStagesDecode; --depth) {
    const int chunks = depth * t.turn_cols;
    if (smem_decode(t, p, splits, depth, chunks, correction).size > room) continue;
    int stages = depth;
    while (stages < most && smem_decode(t, p, splits, stages + 1, chunks, correction).size <= room) ++stages;
    return smem_decode(t, p, splits, stages, chunks, correction);
  }
  const SmemDecode least = smem_decode(t, p, splits, kMinStagesDecode, t.turn_cols + 1, correction);
  return least.size <= room ? least : SmemDecode{};
}

// Output tiles of a problem.
constexpr int64_t tiles_decode(const Problem& p, const TileDecode& t) {
  return ((p.m + t.block_m - 1) / t.block_m) * ((p.n + t.block_n() - 1) / t.block_n());
}
// Output tiles x token tiles, up to which the kernel tells a tile's place by a multiplication (device/scheduler.cuh).
inline constexpr int64_t kMostTilesDecode = int64_t{1} << 32;

// The layout a plan uses.
constexpr SmemDecode decode_layout(const Problem& p, const TileDecode& t, int splits, int num_sms, int smem_per_sm,
                                   const Correction& correction = {}) {
  const bool walks = tiles_decode(p, t) * splits > int64_t{num_sms} * t.blocks;
  return fitting_smem_decode(t, p, splits, walks, smem_beside(smem_per_sm, t.blocks), correction);
}

}  // namespace sparse_marlin
