// What the decode kernel receives: the arguments every GEMM kernel gets, maps for the tensor copies, its shared memory.
#pragma once
#include <cuda.h>

#include "device/kernel_args.h"
#include "plan/smem_decode.h"

namespace sparse_marlin::device {

struct KernelArgsDecode {
  KernelArgs gemm;
  CUtensorMap acts_map;    // [k / 64][m][64], box: the tokens and columns of a chunk
  CUtensorMap scales_map;  // [groups, n], box: groups of a chunk x block_n features; unset where channelwise
  SmemDecode smem;
  int tiles;     // output tiles
  int cols;      // 128-column tiles of k
  int turns;     // of a warp
  int col_step;  // column tiles that the warps along k of all splits take together
};

}  // namespace sparse_marlin::device
