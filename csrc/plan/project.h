// The first product of a low-rank correction as a kernel of its own, for what multiplies the second one like columns of the weight
// (plan/low_rank.h): t = acts * down^T, [m, rank]. Numbers that the launcher and the kernel (device/kernel_project.cuh) share.
//
// Few outputs, each of a long sum: a cluster of `shares` blocks shares out k of a tile of tokens x ranks, and in a block the warps do.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>

#include "format/problem.h"

namespace sparse_marlin {

struct ProjectShape {
  int token_warps;  // 16 tokens each; the other warps share out k
  int rank_blocks;  // 8 ranks each
  int at_once;      // units of k whose operands a warp asks for at once, as many as its registers hold
  static constexpr int kWarps = 8;
  constexpr int tokens() const { return 16 * token_warps; }
  constexpr int ranks() const { return 8 * rank_blocks; }
  constexpr int warps_k() const { return kWarps / token_warps; }
};
inline constexpr std::array kProjectShapes{ProjectShape{1, 2, 8}, ProjectShape{1, 2, 4}, ProjectShape{2, 4, 4}};
inline constexpr int kProjectUnitCols = 32;  // of k that a warp takes at once
// Tokens of each shape, at most. The first is for few blocks: of one with so many registers an SM has no room for the kernel behind it, too.
// The last is for k that is not long: there, and with more tokens, torch's product is as fast or faster, since this kernel reads its
// operands again for every tile, and has few of them on their way.
inline constexpr std::array<int64_t, 3> kTokensProject{32, 64, 128};
inline constexpr int64_t kMaxColsProject = 8192;
constexpr bool worth_projecting(int64_t m, int64_t k) {
  return m <= kTokensProject[1] || (m <= kTokensProject[2] && k <= kMaxColsProject);
}

struct ProjectPlan {
  int shape;
  int shares;  // blocks of a cluster
  int rank_tiles;
  int64_t grid;
};

// k and rank are multiples of 8.
constexpr ProjectPlan project_plan(int64_t m, int64_t k, int rank, int num_sms) {
  constexpr int kMostShares = 8;
  ProjectPlan p{m <= kTokensProject[0] ? 0 : m <= kTokensProject[1] ? 1 : 2, 1, 0, 0};
  const ProjectShape& shape = kProjectShapes[p.shape];
  p.rank_tiles = (rank + shape.ranks() - 1) / shape.ranks();
  const int64_t tiles = (m + shape.tokens() - 1) / shape.tokens() * p.rank_tiles;
  const int64_t units = (k + kProjectUnitCols - 1) / kProjectUnitCols;
  while (p.shares < kMostShares && tiles * p.shares * 2 <= 2 * num_sms && units >= p.shares * 2 * shape.warps_k())
    p.shares *= 2;
  p.grid = tiles * p.shares;
  return p;
}

}  // namespace sparse_marlin
