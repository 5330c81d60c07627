// How L2 treats what a kernel reads of the weights.
#pragma once
#include <cstdint>

namespace sparse_marlin {

// What createpolicy.fractional.L2 returns for the whole of what is accessed: constants of the machine, which in the kernel would be
// put together again for every copy.
inline constexpr uint64_t kEvictFirst = 0x12f0000000000000, kEvictNormal = 0x16f0000000000000;

// Weights that one row of blocks reads must not push activations out of L2.
constexpr uint64_t weights_policy(int tiles_m) { return tiles_m == 1 ? kEvictFirst : kEvictNormal; }

}  // namespace sparse_marlin
