// What the decode kernel receives: the arguments every GEMM kernel gets, maps for the tensor copies, its shared memory.
#pragma once
#include <cuda.h>

#include "device/kernel_args.h"
#include "plan/smem_decode.h"

namespace sparse_marlin::device {

// The low-rank correction (plan/low_rank.h).
struct LowRankArgs {
  const void* down;   // [rank, k] row-major, contiguous, as the activations
  const void* up;     // [n, rank] the same
  void* packets;      // in the workspace
  uint32_t* readers;  // blocks that have read them
  uint64_t tag;       // of this launch's packets: random, not 0
  int rank;
  int shares_log2;
  int lead;  // blocks in front that project
  int lead_clusters;
  int step;         // blocks that multiply
  int num_readers;  // blocks that read
};

struct KernelArgsDecode {
  KernelArgs gemm;
  CUtensorMap acts_map;    // [k / 64][m][64], box: the tokens and columns of a chunk
  CUtensorMap scales_map;  // [groups, n], box: groups of a chunk x block_n features; unset where channelwise
  SmemDecode smem;
  int tiles;        // output tiles
  int cols;         // 128-column tiles of k
  int turns;        // of a warp
  int col_step;     // column tiles that the warps along k of all splits take together
  LowRankArgs low;  // for the kernels with a correction
};

}  // namespace sparse_marlin::device
