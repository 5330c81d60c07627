// Shared memory of a block of the Hopper kernel, in bytes from its start, a 1024-byte boundary: read by the planner, the launcher and the
// kernel.
//   acts      [stage][half][token][64 columns], 128-byte swizzled
//   weights   [stage] of { row tiles of packed weights | scales [rows][block_n] }
//   staging   [consumer][slot][token of a pass][64 features], 128-byte swizzled: the output on its way to global memory
//   team sums [consumer of a team][chunk], float32: what two teams give each other
//   barriers  [stage] full, then [stage] empty, then received: where k is split, the sums that the block owns; then, of each consumer,
//             whether those of the other team's are there
// Where k is split over a cluster, its sums are exchanged in the bytes of acts and weights, once these are done with.
#pragma once
#include <algorithm>

#include "plan/scale_mode.h"
#include "plan/smem.h"
#include "plan/tiles_sm90.h"

namespace sparse_marlin {

inline constexpr int kSwizzleRowBytes = 128;                    // a row of a swizzled box
inline constexpr int kHalfCols = kSwizzleRowBytes / kActBytes;  // columns of such a row: half of a column tile
inline constexpr int kHalves = format::kTileCols / kHalfCols;
inline constexpr int kSwizzleAlign = 1024;
inline constexpr int kMapRowBytes =
    1024;  // packed weights are copied as rows of so many bytes; a map's box has at most 256 words
inline constexpr int kBarrierBytes = 8;
inline constexpr int kMaxSmemSm90 = 227 << 10;  // a block may have so much on compute capability 9.0
inline constexpr int kMaxStagesSm90 = 8;
inline constexpr int kEpilogueTokensSm90 = 64;  // of one pass, about
inline constexpr int kEnoughStagesSm90 = 3;     // 176 x 256 with two took 16 to 20 % longer
inline constexpr int kChunkTokens = 16;         // whose sums of 64 features stay together

struct SmemSm90 {
  int acts_bytes;     // a stage
  int tile_bytes;     // of one row tile of packed weights
  int scales_bytes;   // a stage
  int weights_bytes;  // a stage, scales included
  int pass_tokens;    // tokens of one pass of the epilogue; of the last one the rest
  int passes;         // of a panel
  int pass_bytes;     // a slot of staging
  int slots;          // of a consumer: passes that may be under way at once
  int staging_bytes;  // a consumer
  int stages;
  int weights;  // offsets
  int staging;
  int team_sums;
  int full;
  int empty;
  int received;
  int team_full;
  int size;
};

constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

// Equal passes, since a tensor copy takes a whole one, the largest that are not much longer than kEpilogueTokensSm90.
constexpr int equal_pass_tokens(int block_m) {
  for (int tokens = std::min(block_m, kEpilogueTokensSm90 + kChunkTokens); tokens > kChunkTokens;
       tokens -= kChunkTokens)
    if (block_m % tokens == 0) return tokens;
  return block_m;
}

// Whether tensor copies can take the output.
constexpr bool equal_passes(const ShapeSm90& t, const SmemSm90& s) { return t.block_m % s.pass_tokens == 0; }

constexpr int max_smem(const ShapeSm90& t) {
  constexpr int kPerSm = 228 << 10;  // compute capability 9.0
  return t.blocks() == 1 ? kMaxSmemSm90 : smem_beside(kPerSm, t.blocks());
}

constexpr SmemSm90 smem_sm90(const ShapeSm90& t, int num_bits, ScaleMode mode) {
  SmemSm90 s{};
  s.acts_bytes = kHalves * t.block_m * kSwizzleRowBytes;
  s.tile_bytes = format::tile_bytes(num_bits);
  s.scales_bytes = scale_rows(mode) * t.block_n() * kActBytes;
  s.weights_bytes = t.row_tiles() * s.tile_bytes + s.scales_bytes;
  const int team_sums = (t.teams - 1) * t.block_m * t.block_n() * static_cast<int>(sizeof(float));
  const int room = max_smem(t) - (2 * kMaxStagesSm90 + 1 + t.consumers) * kBarrierBytes - team_sums;
  const auto stages_beside = [&](int tokens) {
    return (room - kSwizzleAlign - t.team_size() * tokens * kSwizzleRowBytes) / (s.acts_bytes + s.weights_bytes);
  };
  s.pass_tokens = equal_pass_tokens(t.block_m);
  if (stages_beside(s.pass_tokens) < kEnoughStagesSm90) s.pass_tokens = kEpilogueTokensSm90;
  s.passes = (t.block_m + s.pass_tokens - 1) / s.pass_tokens;
  s.pass_bytes = s.pass_tokens * kSwizzleRowBytes;
  const int slot = t.team_size() * s.pass_bytes;
  s.stages = std::min(kMaxStagesSm90, stages_beside(s.pass_tokens));
  // a slot for every pass of a tile, as far as stages leave room: a pass then need not wait until another has left
  const int before = round_up(s.stages * (s.acts_bytes + s.weights_bytes), kSwizzleAlign);
  s.slots = std::min(t.panels * s.passes, (room - before) / slot);
  s.staging_bytes = s.slots * s.pass_bytes;
  s.weights = s.stages * s.acts_bytes;
  s.staging = round_up(s.weights + s.stages * s.weights_bytes, kSwizzleAlign);
  s.team_sums = s.staging + t.team_size() * s.staging_bytes;
  s.full = s.team_sums + team_sums;
  s.empty = s.full + s.stages * kBarrierBytes;
  s.received = s.empty + s.stages * kBarrierBytes;
  s.team_full = s.received + kBarrierBytes;
  s.size = s.team_full + t.consumers * kBarrierBytes;
  return s;
}

// Splits of k: a block gets the others' sums of the chunks it owns (device/exchange_sm90.cuh) where the stages were,
// with a place for its own.
inline constexpr int kChunkBytes = kChunkTokens * format::kTileRows * static_cast<int>(sizeof(float));
constexpr int consumer_chunks(const ShapeSm90& t) { return t.panels * t.block_m / kChunkTokens; }
// Of a consumer, that block `rank` of the splits owns; at most that many of block 0.
constexpr int owned_chunks(const ShapeSm90& t, int splits, int rank = 0) {
  return (consumer_chunks(t) - rank + splits - 1) / splits;
}
constexpr int exchange_bytes(const ShapeSm90& t, int splits) {
  return splits * t.team_size() * owned_chunks(t, splits) * kChunkBytes;
}
// What the others send to block `rank`.
constexpr int received_bytes(const ShapeSm90& t, int splits, int rank) {
  return (splits - 1) * t.team_size() * owned_chunks(t, splits, rank) * kChunkBytes;
}

constexpr bool fits_sm90() {
  for (const ShapeSm90& t : kShapesSm90)
    for (int bits : {4, 8})
      for (ScaleMode mode : {ScaleMode::kNone, ScaleMode::kTiles, ScaleMode::kSteps})
        if (smem_sm90(t, bits, mode).stages < 2 || smem_sm90(t, bits, mode).size > max_smem(t)) return false;
  return true;
}
static_assert(fits_sm90());

}  // namespace sparse_marlin
