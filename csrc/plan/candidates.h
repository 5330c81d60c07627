// Everything that could run a problem: kernels, tiles and splits with their predicted times, or why they cannot.
#pragma once
#include <span>
#include <string>
#include <vector>

#include "plan/low_rank.h"
#include "plan/plan.h"

namespace sparse_marlin {

struct Candidate {
  Plan plan;
  std::string rejected;  // why, or empty
};

// The splits that are tried with a tile.
std::span<const int> splits_of(int tile);
// correction.rank > 0: with a low-rank correction in the same launch.
Candidate build(const Problem& problem, const Device& device, int tile, int splits, const Correction& correction = {});
std::vector<Candidate> candidates(const Problem& problem, const Device& device, const Correction& correction = {});

}  // namespace sparse_marlin
