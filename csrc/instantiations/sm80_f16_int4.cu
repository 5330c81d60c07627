// The portable kernel for float16 activations and 4-bit codes, all tiles.
#include "launch/fill_table.cuh"

namespace sparse_marlin {
const KernelTable kKernelsF16Int4 = fill_table<__half, 4>();
}  // namespace sparse_marlin
