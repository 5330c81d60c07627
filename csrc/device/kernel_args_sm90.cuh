// What the Hopper kernel receives: the arguments every GEMM kernel gets, and maps for the tensor copies.
#pragma once
#include <cuda.h>

#include "device/kernel_args.h"

namespace sparse_marlin::device {

struct KernelArgsSm90 {
  KernelArgs gemm;          // tiles_n counts clusters' tiles
  CUtensorMap acts_map;     // [m, k], box: block_m tokens x 64 columns
  CUtensorMap weights_map;  // [row tiles, 1024-byte rows, 256 words], box: what a block reads of a 128-column tile
  CUtensorMap scales_map;   // [groups, n], box: groups of a 128-column tile x block_n features; unset where channelwise
  CUtensorMap out_map;      // [m, n], box: tokens of a pass x 64 features; unset unless out_mapped
  int out_mapped;           // rows of the output start at multiples of 16 bytes, as tensor copies need
  uint32_t stage_bytes;     // that arrive for a stage
  uint32_t zero;            // 0, which the compiler must not know (renew in mainloop_sm90.cuh)
};

}  // namespace sparse_marlin::device
