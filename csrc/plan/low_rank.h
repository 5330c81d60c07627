// How a low-rank correction is computed, out += (acts * down^T) * up^T, with down [rank, k] and up [n, rank]: numbers that the planner,
// the launchers and the kernels share.
//
// `up` is dense, or packed_24 like the weight: then it is a weight of 128 columns for every 64 ranks, of which each rank fills one,
// in the first half of them where rank % 4 < 2, otherwise in the second half, 64 columns on. So every quad has two values, and what
// this weight multiplies is t = acts * down^T, twice for every 64 ranks. It has scales of its own, in groups of the weight's size.
//
// The decode kernel: blocks in front of those that multiply, or behind them, project, t = acts * down^T, a tile's 8 or 16 tokens x 8 ranks x a
// share of k each.
//   workspace  a counter; packets (device/project_decode.cuh): four values of t each [token][rank / 4], then two sums each [share of k but
//              the last][token][rank / 2]
#pragma once
#include <algorithm>

#include "format/problem.h"
#include "plan/smem_sm90.h"
#include "plan/tiles_decode.h"
#include "plan/workspace.h"

namespace sparse_marlin {

inline constexpr int kMaxRank = 128;          // of the decode kernel
inline constexpr int kMaxRankPacked = 1024;   // where `up` is packed and the wgmma.sp kernel multiplies it
inline constexpr int kMaxTokensLowRank = 16;  // of the decode kernel, too
inline constexpr int kRankUnit = 16;          // ranks of an MMA of the expansion
inline constexpr int kProjectRanks = 8;       // of a block that projects: the rank is a multiple of it
inline constexpr int kProjectCols = 32;       // of k that a warp of it takes at once
inline constexpr int kSumRanks = 2;           // of a packet of sums
inline constexpr int kPacketRanks = 4;        // of a packet of t
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

// What is projected together: the tokens of a tile x 8 ranks.
constexpr int project_groups(int64_t tokens, int rank, const TileDecode& tile) {
  return rank / kProjectRanks * static_cast<int>((tokens + tile.block_m - 1) / tile.block_m);
}
// Shares of k, a power of 2: a block should not have more columns to read than its warps load at once, about: 2048, and half as many where
// they load twice the tokens. Smaller ones are there earlier, where the multiplication's `blocks` leave places. More blocks than SMs that
// project would only wait for each other.
inline constexpr int kMostShares = 8;
constexpr int project_shares(int groups, int64_t k, int64_t blocks, int num_sms, const TileDecode& tile) {
  const int most_cols = blocks <= num_sms || tile.token_blocks() > 1 ? 1024 : 2048;
  int shares = 1;
  while (shares < kMostShares && k / shares > most_cols && groups * 2 * shares <= num_sms) shares *= 2;
  return shares;
}
// Blocks that project, in whole clusters. They come on top of the multiplication's blocks, of which the planner leaves some out for them if
// that makes no turn more; otherwise the last ones start when these have ended, and as blocks take output tiles in turn, those have the
// fewest.
constexpr int project_blocks(int groups, int shares, int cluster) { return round_up(groups * shares, cluster); }

// Whether they come behind those that multiply. These, no more than SMs, then lie one on an SM (of 128 behind 64 in front, 57 share theirs with
// another, and end last); t is there later, for which a long k leaves time. All must find places at once: who waits for blocks behind
// it should not be what keeps them from starting.
inline constexpr int64_t kBehindCols = 8192;
constexpr bool project_behind(int64_t k, int64_t blocks, int64_t project_blocks, int num_sms, int places) {
  return k >= kBehindCols && blocks <= num_sms && blocks + project_blocks <= int64_t{num_sms} * places;
}
// Bytes of `down` that each of the blocks that multiply brings into L2 for those behind.
constexpr int64_t down_piece(int rank, int64_t k, int64_t blocks) {
  const int64_t copies = rank * k * kActBytes / kCopyBytes;
  return (copies + blocks - 1) / blocks * kCopyBytes;
}
// Turns before a block's last request for weights at which such a launch lets the next one start: that one's blocks find places on all SMs
// as long as none of this one's has ended. So many did best on an H200 (docs/KERNEL_SM90.md, attempt 120).
constexpr int early_turns(const TileDecode& t) { return 2 * t.token_blocks(); }
// Looks for t, each a way to L2 and a rest, before a block that multiplies projects for itself (device/low_rank_decode.cuh).
inline constexpr int kLooks = 1000;

constexpr int num_packets(int64_t tokens, int rank) { return static_cast<int>(tokens) * rank / kPacketRanks; }
constexpr int sum_packets(int64_t tokens, int rank, int shares) {
  return static_cast<int>(tokens) * rank / kSumRanks * (shares - 1);
}
constexpr int64_t low_rank_workspace_bytes(int64_t tokens, int rank, int shares) {
  return kWorkspaceAlign + int64_t{sum_packets(tokens, rank, shares) + num_packets(tokens, rank)} * kPacketBytes;
}

}  // namespace sparse_marlin
