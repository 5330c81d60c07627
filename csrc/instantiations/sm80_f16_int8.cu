// The portable kernel for float16 activations and 8-bit codes, all tiles.
#include "launch/fill_table.cuh"

namespace sparse_marlin {
const KernelTable kKernelsF16Int8 = fill_table<__half, 8>();
}  // namespace sparse_marlin
