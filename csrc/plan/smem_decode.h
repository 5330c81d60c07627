// Shared memory of a block of the decode kernel, in bytes from a 1024-byte boundary: read by the planner and the launcher, which hands
// it to the kernel.
//   chunks    [chunk] of what a 128-column tile of every warp along k needs:
//             acts [half tile][token][64 columns], 128-byte swizzled
//             scales [group][block_n]
//   weights   [warp][stage][column tile of a turn] of { slices of packed weights }
//   exchange  [warp along k][token of 8][block_n + padding] float32: the sums
//   barriers  weights full [warp][stage], then chunk full [chunk], then chunk empty [chunk]
#pragma once
#include <algorithm>

#include "plan/scale_mode.h"
#include "plan/smem_sm90.h"
#include "plan/tiles_decode.h"

namespace sparse_marlin {

inline constexpr int kMaxStagesDecode = 6;
inline constexpr int kMinStagesDecode = 2;
inline constexpr int kMaxChunks = 4;
inline constexpr int kSmemPerBlock = 1024;  // what the system takes of an SM's shared memory for a block
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
constexpr int turns(const TileDecode& t, int64_t k) {
  const int cols = t.warps_k * t.turn_cols;
  return static_cast<int>((format::col_tiles(k) + cols - 1) / cols);
}

struct SmemDecode {
  int rows;          // tokens kept: those that exist
  int copied_bytes;  // of a chunk, by its two copies
  int scales;        // offset in a chunk
  int chunk_bytes;
  int chunks;
  int stages;
  int weights;  // offsets
  int exchange;
  int weights_full;
  int chunk_full;
  int chunk_empty;
  int size;  // with room to align the start
};

constexpr SmemDecode smem_decode(const TileDecode& t, const Problem& p, int stages, int chunks) {
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
  s.weights_full = s.exchange + sums * static_cast<int>(sizeof(float));
  s.chunk_full = s.weights_full + t.warps() * stages * kBarrierBytes;
  s.chunk_empty = s.chunk_full + chunks * kBarrierBytes;
  s.size = s.chunk_empty + chunks * kBarrierBytes + kSwizzleAlign;
  return s;
}

// The layout that fits `room` bytes: as many chunks and then stages as a warp has use for, but two turns of weights come first, being
// farther away than activations. stages == 0 where nothing fits.
constexpr SmemDecode smem_decode(const TileDecode& t, const Problem& p, bool walks, int room) {
  const int needed = turns(t, p.k);
  const int most_stages = walks ? kMaxStagesDecode : std::clamp(needed, kMinStagesDecode, kMaxStagesDecode);
  const int most_chunks = walks ? kMaxChunks : std::clamp(needed * t.turn_cols, t.turn_cols + 1, kMaxChunks);
  const int wanted = std::min(most_stages, t.turn_cols > 1 ? kMinStagesDecode : kMinStagesDecode + 1);
  for (int chunks = most_chunks; chunks > t.turn_cols; --chunks) {
    for (int stages = most_stages; stages >= (chunks > t.turn_cols + 1 ? wanted : kMinStagesDecode); --stages) {
      const SmemDecode s = smem_decode(t, p, stages, chunks);
      if (s.size <= room) return s;
    }
  }
  return SmemDecode{};
}

// Output tiles of a problem.
constexpr int64_t tiles_decode(const Problem& p, const TileDecode& t) {
  return ((p.m + t.block_m - 1) / t.block_m) * ((p.n + t.block_n() - 1) / t.block_n());
}
// The layout a plan uses.
constexpr SmemDecode decode_layout(const Problem& p, const TileDecode& t, int num_sms, int smem_per_sm) {
  const bool walks = tiles_decode(p, t) > int64_t{num_sms} * t.blocks;
  return smem_decode(t, p, walks, smem_per_sm / t.blocks - kSmemPerBlock);
}

}  // namespace sparse_marlin
