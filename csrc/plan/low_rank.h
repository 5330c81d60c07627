// How the decode kernel computes a low-rank correction, out += (acts * down^T) * up^T, with down [rank, k] and up [n, rank]: numbers
// that the planner, the launcher and the kernel share.
//
// Blocks in front of the grid project: t = acts * down^T. Each takes 8 ranks and a share of k, and leaves its sums in the workspace as
// packets of 16 bytes, two sums and a tag; the other blocks add up the shares in a fixed order.
//   workspace  readers, 256 bytes; then packets [token][64 ranks][share of k][two ranks]
#pragma once
#include <algorithm>

#include "format/problem.h"
#include "plan/smem_sm90.h"
#include "plan/workspace.h"

namespace sparse_marlin {

inline constexpr int kMaxRank = 128;
inline constexpr int kMaxTokensLowRank = 16;  // that the projection's MMA takes
inline constexpr int kRankUnit = 16;          // ranks that a warp expands at once; the rest of the last unit is zeros
inline constexpr int kProjectRanks = 8;       // of a block that projects
inline constexpr int kProjectCols = 32;       // of k that a warp of it takes at once
inline constexpr int kPacketRanks = 2;
inline constexpr int kPacketBytes = 16;
inline constexpr int kRowRanks = kPacketRanks * format::kLanes;  // ranks that a warp reads with one packet a lane

constexpr int padded_rank(int rank) { return round_up(rank, kRankUnit); }
constexpr int packet_rows(int rank) { return (rank + kRowRanks - 1) / kRowRanks; }  // of a token

// Shares of k, as a power of 2. Few tokens: more blocks, so that each has less to read after the kernel before; more tokens: fewer,
// since every block of the multiplication reads all shares, at 16 tokens and rank 64 two times 8 KB.
constexpr int project_shares_log2(int64_t tokens) { return tokens <= 4 ? 2 : 1; }
constexpr int project_blocks(int64_t tokens, int rank) {
  return padded_rank(rank) / kProjectRanks << project_shares_log2(tokens);
}
// The same in whole clusters. They come on top of the grid of the multiplication, even where that fills the GPU: its last blocks then
// start when these have ended, and since blocks take output tiles in turn, the last ones have the fewest.
constexpr int lead_blocks(int64_t tokens, int rank, int cluster) {
  return round_up(project_blocks(tokens, rank), cluster);
}

// Packets, in units of what a warp reads with one a lane.
constexpr int packet_units(int64_t tokens, int rank) {
  return static_cast<int>(tokens) * packet_rows(rank) << project_shares_log2(tokens);
}
constexpr int64_t low_rank_workspace(int64_t tokens, int rank) {
  return kWorkspaceAlign + int64_t{packet_units(tokens, rank)} * format::kLanes * kPacketBytes;
}

// In shared memory, floats between two tokens of t: 16-byte loads of four neighbours of two tokens then lie in different banks.
constexpr int projected_pitch(int rank) { return padded_rank(rank) | kRankUnit; }

}  // namespace sparse_marlin
