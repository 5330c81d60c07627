// The Hopper kernel for float16 activations and 4-bit codes, all tiles.
#include "launch/fill_table_sm90.cuh"

namespace sparse_marlin {
const KernelTableSm90 kKernelsSm90F16Int4 = fill_table_sm90<__half, 4>();
}  // namespace sparse_marlin
