// plan(Problem, Device) -> Plan: which kernel, tile and split a multiplication runs with. Pure: no CUDA call, no environment, no
// global; the GPU is an argument, so the choice for any GPU is tested on a machine without one.
#pragma once
#include <cstdint>
#include <string>

#include "format/problem.h"

namespace sparse_marlin {

// A GPU, as far as planning needs to know it.
struct Device {
  int compute_capability = 0;  // 10 * major + minor
  int num_sms = 0;
  int smem_per_block = 0;  // bytes a block may opt in to
  int smem_per_sm = 0;     // bytes
  int64_t l2_bytes = 0;
  double dram_gb_per_s = 0;    // peak of the memory's data sheet; 0: unknown, taken from the generation
  bool hopper_kernels = true;  // this build holds native code for compute capability 9.0a, without which they are empty
};

struct Plan {
  int tile = -1;  // number of the tile (plan/tiles_all.h)
  // Blocks along k that share an output tile; in the portable kernel their sums meet in the workspace. Negative: stream-K, with so
  // many blocks an SM (plan/stream_k.h).
  int splits = 1;
  int num_stages = 0;           // depth of the shared-memory ring
  int64_t grid = 0;             // blocks
  int rank = 0;                 // of the low-rank correction that the launch adds (plan/low_rank.h), or 0
  int tail = 0;                 // 128-column tiles of its second factor, where that is packed
  int project_blocks = 0;       // blocks of the grid that compute its projection
  int shares = 0;               // of k, that these blocks share out
  bool behind = false;          // they come behind the blocks that multiply, not in front
  int threads = 0;              // a block
  int smem_bytes = 0;           // dynamic, a block
  bool spread = false;          // no two blocks on an SM (launch/spread.h)
  int64_t workspace_bytes = 0;  // device memory the launch needs beside its tensors (plan/workspace.h)
  double predicted_us = 0;
  bool dependent =
      true;  // may start before the kernel before it has finished, where the GPU can (device/ptx/dependent_launch.cuh)
};

// Whether the planner considers blocks that share activations. Against the same tile alone they take 1 to 4 % longer where a block goes through
// 32 column tiles or fewer, and 1 to 2 % less where it goes through more than 128; up to 256 tokens they gain nothing (1300 pairs in
// three sweeps). No term of the cost says so: L2 alone would have them win almost everywhere (docs/KERNEL_SM90.md).
inline constexpr int64_t kTokensAlone = 256;    // up to so many never,
inline constexpr int64_t kColsAlone = 96;       // up to so many column tiles a block not, either,
inline constexpr int64_t kTokensShared = 1024;  // above so many tokens always
bool may_share(const Problem& problem, const Device& device, int tile);

// Why this problem cannot run on this device (a full sentence part, e.g. "expected a GPU of compute capability 8.0 or higher, got
// 7.5"), or empty.
std::string why_unsupported(const Problem& problem, const Device& device);

// The best plan. Throws std::invalid_argument with why_unsupported's text.
Plan plan(const Problem& problem, const Device& device);
// The best plan with the tile (and the split, unless 0) given: for tests and for tuning. Throws where the two do not fit.
Plan plan_with_tile(const Problem& problem, const Device& device, int tile, int splits);
// The best plan that multiplies and adds a low-rank correction in one launch: the decode kernel's, which projects, too, or, where `packed`
// (the second factor), the wgmma.sp kernel's, for which a product before it has projected. Where there is none (a large rank, a GPU or
// sizes that they do not take; a dense factor and many tokens), plan()'s, whose rank is 0: the correction is then left to two products.
Plan plan_low_rank(const Problem& problem, const Device& device, int64_t rank, bool packed = false);
// With the tile (and the split, when not 0) given, as plan_with_tile; with a correction in any case.
Plan plan_low_rank_with_tile(const Problem& problem, const Device& device, int64_t rank, int tile, int splits,
                             bool packed = false);
// A readable account of the choice: every candidate with its predicted time or the reason it was rejected.
std::string explain(const Problem& problem, const Device& device);

}  // namespace sparse_marlin
