// The Hopper kernel for bfloat16 activations and 4-bit codes, all tiles.
#include "launch/fill_table_sm90.cuh"

namespace sparse_marlin {
const KernelTableSm90 kKernelsSm90Bf16Int4 = fill_table_sm90<__nv_bfloat16, 4>();
}  // namespace sparse_marlin
