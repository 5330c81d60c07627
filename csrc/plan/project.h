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
  int token_warps;  // 16 tokens each
  int warps_k;      // that share out k
  int rank_blocks;  // 8 ranks each
  int at_once;  // units of k whose operands a warp asks for at once, as many as its registers hold; 0: a ring of stages
  constexpr bool has_ring() const { return at_once == 0; }
  constexpr int tokens() const { return 16 * token_warps; }
  constexpr int ranks() const { return 8 * rank_blocks; }
  constexpr int threads() const { return 32 * (token_warps * warps_k + (has_ring() ? 1 : 0)); }
  constexpr int unit_cols() const { return has_ring() ? 64 : 32; }  // of k, at once
};
inline constexpr std::array kProjectShapes{ProjectShape{1, 8, 2, 8}, ProjectShape{1, 8, 2, 4},
                                           ProjectShape{4, 1, 8, 0}};
// Tokens of the first two, at most; the very first is for few blocks, since of one with so many registers an SM has no room for a block
// of the kernel behind it, too.
inline constexpr int64_t kFewestTokensProject = 32, kFewTokensProject = 64;
// Activations beyond which torch's product is as fast: this kernel reads `down` again for every 64 tokens.
inline constexpr int64_t kMostProjected = int64_t{1} << 24;

// The ring's stages: more would leave an SM no room for a block of the kernel behind this one, which 64 tokens have two of.
inline constexpr int kProjectStages = 5;

struct ProjectPlan {
  int shape;
  int shares;  // blocks of a cluster
  int rank_tiles;
  int64_t grid;
};

// k and rank are multiples of 8.
constexpr ProjectPlan project_plan(int64_t m, int64_t k, int rank, int num_sms) {
  constexpr int kMostShares = 8;
  ProjectPlan p{m <= kFewestTokensProject ? 0 : m <= kFewTokensProject ? 1 : 2, 1, 0, 0};
  const ProjectShape& shape = kProjectShapes[p.shape];
  p.rank_tiles = (rank + shape.ranks() - 1) / shape.ranks();
  const int64_t tiles = (m + shape.tokens() - 1) / shape.tokens() * p.rank_tiles;
  const int64_t units = (k + shape.unit_cols() - 1) / shape.unit_cols();
  while (p.shares < kMostShares && tiles * p.shares * 2 <= 2 * num_sms && units >= p.shares * 2 * shape.warps_k)
    p.shares *= 2;
  p.grid = tiles * p.shares;
  return p;
}

}  // namespace sparse_marlin
