// The decode kernel for bfloat16 activations and 4-bit codes, with a low-rank correction, all tiles.
#include "launch/fill_table_decode.cuh"

namespace sparse_marlin {
const KernelTableDecode kKernelsDecodeLowRankBf16Int4 = fill_table_decode<__nv_bfloat16, 4, true>();
}  // namespace sparse_marlin
