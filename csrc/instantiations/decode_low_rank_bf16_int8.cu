// The decode kernel for bfloat16 activations and 8-bit codes, with a low-rank correction, all tiles.
#include "launch/fill_table_decode.cuh"

namespace sparse_marlin {
const KernelTableDecode kKernelsDecodeLowRankBf16Int8 = fill_table_decode<__nv_bfloat16, 8, true>();
}  // namespace sparse_marlin
