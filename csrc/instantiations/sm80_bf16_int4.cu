// The portable kernel for bfloat16 activations and 4-bit codes, all tiles.
#include "launch/fill_table.cuh"

namespace sparse_marlin {
const KernelTable kKernelsBf16Int4 = fill_table<__nv_bfloat16, 4>();
}  // namespace sparse_marlin
