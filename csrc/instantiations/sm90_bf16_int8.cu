// The Hopper kernel for bfloat16 activations and 8-bit codes, all tiles.
#include "launch/fill_table_sm90.cuh"

namespace sparse_marlin {
const KernelTableSm90 kKernelsSm90Bf16Int8 = fill_table_sm90<__nv_bfloat16, 8>();
}  // namespace sparse_marlin
