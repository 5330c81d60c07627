// Shared memory of a block of the portable kernel, in bytes: read by the planner, the launcher and the kernel.
//   ring      [team][stage] of { slices of packed weights | activations [rows][128 columns] | scales [rows][block_n] }
//   epilogue  [team][tokens of a pass][block_n + padding] float32, in the same bytes once the ring is drained
#pragma once
#include <algorithm>

#include "format/problem.h"
#include "plan/tiles.h"

namespace sparse_marlin {

inline constexpr int kActBytes = 2;    // float16, bfloat16
inline constexpr int kCopyBytes = 16;  // one asynchronous copy
inline constexpr int kMinStages = 2;
inline constexpr int kMaxStages = 5;
inline constexpr int kEpiloguePad = 4;     // floats: spreads the four token columns of a warp over the banks
inline constexpr int kEpilogueBlocks = 2;  // 8-token blocks a warp hands over in one pass of the epilogue
inline constexpr int kPartialRows = 32;    // blocks of at most so many tokens keep only those that exist
inline constexpr int kActRowBytes = format::kTileCols * kActBytes;

// A block that keeps others of its launch off its SM (launch/spread.h) has a margin more than half of the SM's shared memory. Blocks of
// which two fit an SM leave that margin, and as much again, to fit beside such a one.
inline constexpr int kSmemPerBlock = 1024;  // what the system takes for a block
inline constexpr int kSmemMargin = 128;
constexpr int smem_alone(int smem_per_sm) { return smem_per_sm / 2 - kSmemPerBlock + kSmemMargin; }
constexpr int smem_beside(int smem_per_sm, int blocks) {
  return smem_per_sm / blocks - kSmemPerBlock - 2 * kSmemMargin;
}

// Rows of scales a 128-column tile needs; channelwise scales are applied at the end and need none.
constexpr int scale_rows(int group_size) {
  return group_size == kChannelwise ? 0 : std::max(1, format::kTileCols / group_size);
}
constexpr int weight_stage_bytes(const Tile& t, int num_bits) { return t.slices() * format::slice_bytes(num_bits); }
// Tokens of a block kept in shared memory. Blocks of many tokens keep all, so that an address needs no comparison.
constexpr int act_rows(const Tile& t, int64_t m) {
  return t.block_m > kPartialRows ? t.block_m : static_cast<int>(std::min<int64_t>(t.block_m, m));
}
constexpr int stage_bytes(const Tile& t, int num_bits, int rows, int group_size) {
  const int bytes =
      weight_stage_bytes(t, num_bits) + rows * kActRowBytes + scale_rows(group_size) * t.block_n * kActBytes;
  return (bytes + kActRowBytes - 1) / kActRowBytes * kActRowBytes;  // rows of activations are addressed by exclusive or
}
constexpr int epilogue_blocks(const Tile& t) { return std::min(kEpilogueBlocks, t.warp_m() / kMmaTokens); }
constexpr int epilogue_tokens(const Tile& t) { return t.warps_m * epilogue_blocks(t) * kMmaTokens; }
constexpr int epilogue_bytes(const Tile& t) {
  return t.warps_k * epilogue_tokens(t) * (t.block_n + kEpiloguePad) * static_cast<int>(sizeof(float));
}
constexpr int smem_bytes(const Tile& t, int num_bits, int rows, int group_size, int num_stages) {
  return std::max(t.warps_k * num_stages * stage_bytes(t, num_bits, rows, group_size), epilogue_bytes(t));
}

}  // namespace sparse_marlin
