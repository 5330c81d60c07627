// The workspace of a plan: float32 partial sums of the splits or of stream-K's ranges and their flags, then copies of inputs whose
// rows do not start at multiples of 16 bytes, which asynchronous copies need (k not a multiple of 8; n not a multiple of 8 with
// grouped scales).
#pragma once
#include "format/problem.h"
#include "plan/smem.h"
#include "plan/tiles_all.h"

namespace sparse_marlin {

inline constexpr int kRowElements = kCopyBytes / kActBytes;  // rows start at multiples of it
inline constexpr int64_t kWorkspaceAlign = 256;

constexpr int64_t aligned_row(int64_t elements) { return (elements + kRowElements - 1) / kRowElements * kRowElements; }
constexpr bool acts_need_copy(const Problem& p) { return p.k % kRowElements != 0; }
constexpr bool scales_need_copy(const Problem& p) { return p.group_size != kChannelwise && p.n % kRowElements != 0; }

// Of the portable kernel's splits.
constexpr int64_t split_bytes(const Problem& p, int splits) {
  return splits > 1 ? p.m * p.n * splits * int64_t{sizeof(float)} : 0;
}
// Of stream-K: the sums of one tile a block; after them a flag for each of a block's consumers.
constexpr int64_t range_sums_bytes(const ShapeSm90& shape) {
  return int64_t{shape.block_m} * shape.block_n() * int64_t{sizeof(float)};
}
constexpr int64_t stream_bytes(const ShapeSm90& shape, int64_t blocks) {
  return blocks * (range_sums_bytes(shape) + shape.team_size() * int64_t{sizeof(uint64_t)});
}

struct Workspace {  // bytes from the start of the workspace
  int64_t acts;
  int64_t scales;
  int64_t size;
};
constexpr Workspace workspace(const Problem& p, int64_t partial_bytes) {
  const auto round = [](int64_t bytes) { return (bytes + kWorkspaceAlign - 1) / kWorkspaceAlign * kWorkspaceAlign; };
  const int64_t partials = round(partial_bytes);
  const int64_t acts = acts_need_copy(p) ? p.m * aligned_row(p.k) * kActBytes : 0;
  const int64_t scales = scales_need_copy(p) ? num_groups(p.k, p.group_size) * aligned_row(p.n) * kActBytes : 0;
  return {partials, partials + round(acts), partials + round(acts) + round(scales)};
}
constexpr int64_t partial_bytes(const Problem& p, int tile, int splits, int64_t grid) {
  if (family(tile) == Family::kSm80) return split_bytes(p, splits);
  return splits < 0 ? stream_bytes(tile_sm90(tile).size(), grid) : 0;
}

}  // namespace sparse_marlin
