// How a low-rank correction is computed, out += (acts * down^T) * up^T, with down [rank, k] and up [n, rank]: numbers that the planner,
// the launchers and the kernels share.
//
// `up` is dense, or packed_24 like the weight: then it is a weight of 128 columns for every 64 ranks, of which each rank fills one,
// in the first half of them where rank % 4 < 2, otherwise in the second half, 64 columns on. So every quad has two values, and what
// this weight multiplies is t = acts * down^T, twice for every 64 ranks. It has scales of its own, in groups of the weight's size.
//
// The decode kernel: blocks in front of the grid project, t = acts * down^T. Each takes 8 ranks and a share of k; the other blocks add
// up the shares in a fixed order.
//   workspace  readers; flags [block that projects]; sums [share of k][token][rank + padding] float32
#pragma once
#include <algorithm>

#include "format/problem.h"
#include "plan/smem_sm90.h"
#include "plan/workspace.h"

namespace sparse_marlin {

inline constexpr int kMaxRank = 128;           // of the decode kernel
inline constexpr int kMaxRankPacked = 1024;    // where `up` is packed and the wgmma.sp kernel multiplies it
inline constexpr int kMaxTokensLowRank = 16;   // that the projection's MMA takes
inline constexpr int kRankUnit = 16;           // ranks of an MMA of the expansion
inline constexpr int kProjectRanks = 8;        // of a block that projects: the rank is a multiple of it
inline constexpr int kProjectCols = 32;        // of k that a warp of it takes at once
inline constexpr int kUpBoxRanks = kHalfCols;  // ranks of a dense `up` that one tensor copy brings
inline constexpr int kTailRanks = kHalfCols;   // ranks of a column tile of a packed `up`

// 128-column tiles of a packed `up`.
constexpr int tail_tiles(int64_t rank) { return static_cast<int>((rank + kTailRanks - 1) / kTailRanks); }

struct Correction {
  int rank = 0;         // 0: none
  bool packed = false;  // `up`
  constexpr int tail() const { return packed ? tail_tiles(rank) : 0; }
};

// Floats between two tokens of t; with 16-bit values in their place, pairs of 8 tokens lie in different banks.
constexpr int projected_pitch(int rank) { return round_up(rank, 32) + 8; }

// Shares of k, as a power of 2: a block should not have more columns to read than its warps load at once, about. Every block of the
// multiplication takes all shares through shared memory, which must not have more of them than its rings can spare.
constexpr int project_shares_log2(int64_t tokens, int64_t k, int rank) {
  constexpr int kShareCols = 1024, kMostLog2 = 3, kRoom = 20 << 10;
  const int share_bytes = static_cast<int>(tokens) * projected_pitch(rank) * static_cast<int>(sizeof(float));
  int log2 = 0;
  while (log2 < kMostLog2 && (k >> log2) > kShareCols && share_bytes << (log2 + 1) <= kRoom) ++log2;
  return log2;
}
constexpr int project_blocks(int64_t tokens, int64_t k, int rank) {
  return rank / kProjectRanks << project_shares_log2(tokens, k, rank);
}
// The same in whole clusters. They come on top of the multiplication's blocks, of which the planner leaves some out for them if that makes
// no turn more; otherwise the last ones start when these have ended, and as blocks take output tiles in turn, those have the fewest.
constexpr int lead_blocks(int64_t tokens, int64_t k, int rank, int cluster) {
  return round_up(project_blocks(tokens, k, rank), cluster);
}

// All shares of t.
constexpr int projected_bytes(int64_t tokens, int64_t k, int rank) {
  return (static_cast<int>(tokens) * projected_pitch(rank) * static_cast<int>(sizeof(float)))
         << project_shares_log2(tokens, k, rank);
}

struct LowRankWorkspace {  // bytes from its start
  int64_t flags;
  int64_t sums;
  int64_t size;
};
constexpr LowRankWorkspace low_rank_workspace(int64_t tokens, int64_t k, int rank) {
  const int64_t flags = project_blocks(tokens, k, rank) * int64_t{sizeof(uint64_t)};
  const int64_t sums = kWorkspaceAlign + (flags + kWorkspaceAlign - 1) / kWorkspaceAlign * kWorkspaceAlign;
  return {kWorkspaceAlign, sums, sums + projected_bytes(tokens, k, rank)};
}

}  // namespace sparse_marlin
