// What a GEMM kernel receives: the problem's pointers and the plan's numbers, narrowed to what device arithmetic uses.
#pragma once
#include "device/params.h"

namespace sparse_marlin::device {

struct KernelArgs {
  GemmParams params;  // acts and scales: their aligned copies where there are any
  float* partials;    // [splits, m, n], null where splits == 1
  int m;              // tokens
  int n;              // out features
  int k;              // in features, dense
  int tiles_m;        // output tiles of the plan's tile
  int tiles_n;
  int splits;
  int num_groups;  // rows of scales
  int group_size;  // kChannelwise: scales are applied in the epilogue
  int num_stages;
  int act_rows;     // tokens of a block kept in shared memory: min(block_m, m)
  int acts_row;     // distance of two rows of params.acts, in elements; rows start at multiples of 16 bytes
  int scales_row;   // the same of params.scales
  int group_shift;  // log2(group_size)
};

}  // namespace sparse_marlin::device
