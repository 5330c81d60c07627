// How a low-rank correction is computed, out += (acts * down^T) * up^T, with down [rank, k] and up [n, rank]: numbers that the planner,
// the launchers and the kernels share.
//
// `up` is dense, or packed_24 like the weight: then it is a weight of 128 columns for every 64 ranks, of which each rank fills one,
// in the first half of them where rank % 4 < 2, otherwise in the second half, 64 columns on. So every quad has two values, and what
// this weight multiplies is t = acts * down^T, twice for every 64 ranks. It has scales of its own, in groups of the weight's size.
//
// The decode kernel: blocks in front of the grid project, t = acts * down^T, 8 tokens x 8 ranks x a share of k each.
//   workspace  readers; packets of two sums each [share of k][token][rank / 2] (device/low_rank_decode.cuh)
#pragma once
#include <algorithm>

#include "format/problem.h"
#include "plan/smem_sm90.h"
#include "plan/workspace.h"

namespace sparse_marlin {

inline constexpr int kMaxRank = 128;          // of the decode kernel
inline constexpr int kMaxRankPacked = 1024;   // where `up` is packed and the wgmma.sp kernel multiplies it
inline constexpr int kMaxTokensLowRank = 16;  // of the decode kernel, too
inline constexpr int kRankUnit = 16;          // ranks of an MMA of the expansion
inline constexpr int kProjectRanks = 8;       // of a block that projects: the rank is a multiple of it
inline constexpr int kProjectCols = 32;       // of k that a warp of it takes at once
inline constexpr int kPacketRanks = 2;        // of a packet of t
inline constexpr int kPacketBytes = 16;
inline constexpr int kUpBoxRanks = kHalfCols;  // ranks of a dense `up` that one tensor copy brings
inline constexpr int kTailRanks = kHalfCols;   // ranks of a column tile of a packed `up`

// 128-column tiles of a packed `up`.
constexpr int tail_tiles(int64_t rank) { return static_cast<int>((rank + kTailRanks - 1) / kTailRanks); }

struct Correction {
  int rank = 0;         // 0: none
  bool packed = false;  // `up`
  constexpr int tail() const { return packed ? tail_tiles(rank) : 0; }
};

// Values between two tokens of t in shared memory: pairs of 8 tokens lie in different banks.
constexpr int projected_pitch(int rank) { return round_up(rank, 32) + 8; }

// Shares of k, as a power of 2: a block should not have more columns to read than its warps load at once, about. Every block of the
// multiplication takes all shares through shared memory, which must not have more of them than its rings can spare.
constexpr int project_shares_log2(int64_t tokens, int64_t k, int rank) {
  constexpr int kShareCols = 2048, kMostLog2 = 2, kRoom = 20 << 10;
  const int share_bytes = static_cast<int>(tokens) * rank / kPacketRanks * kPacketBytes;
  int log2 = 0;
  while (log2 < kMostLog2 && (k >> log2) > kShareCols && share_bytes << (log2 + 1) <= kRoom) ++log2;
  return log2;
}
constexpr int project_blocks(int64_t tokens, int64_t k, int rank) {
  const int groups = rank / kProjectRanks * static_cast<int>((tokens + kMmaTokens - 1) / kMmaTokens);
  return groups << project_shares_log2(tokens, k, rank);
}
// The same in whole clusters. They come on top of the multiplication's blocks, of which the planner leaves some out for them if that makes
// no turn more; otherwise the last ones start when these have ended, and as blocks take output tiles in turn, those have the fewest.
constexpr int lead_blocks(int64_t tokens, int64_t k, int rank, int cluster) {
  return round_up(project_blocks(tokens, k, rank), cluster);
}

constexpr int num_packets(int64_t tokens, int64_t k, int rank) {
  return static_cast<int>(tokens) * rank / kPacketRanks << project_shares_log2(tokens, k, rank);
}
constexpr int64_t packets_bytes(int64_t tokens, int64_t k, int rank) {
  return int64_t{num_packets(tokens, k, rank)} * kPacketBytes;
}
constexpr int64_t low_rank_workspace_bytes(int64_t tokens, int64_t k, int rank) {
  return kWorkspaceAlign + packets_bytes(tokens, k, rank);
}

}  // namespace sparse_marlin
