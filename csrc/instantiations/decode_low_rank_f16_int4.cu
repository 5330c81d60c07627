// The decode kernel for float16 activations and 4-bit codes, with a low-rank correction, all tiles.
#include "launch/fill_table_decode.cuh"

namespace sparse_marlin {
const KernelTableDecode kKernelsDecodeLowRankF16Int4 = fill_table_decode<__half, 4, true>();
}  // namespace sparse_marlin
