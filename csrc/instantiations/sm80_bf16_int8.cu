// The portable kernel for bfloat16 activations and 8-bit codes, all tiles.
#include "launch/fill_table.cuh"

namespace sparse_marlin {
const KernelTable kKernelsBf16Int8 = fill_table<__nv_bfloat16, 8>();
}  // namespace sparse_marlin
