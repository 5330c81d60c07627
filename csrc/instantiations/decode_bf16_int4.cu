// The decode kernel for bfloat16 activations and 4-bit codes, all tiles.
#include "launch/fill_table_decode.cuh"

namespace sparse_marlin {
const KernelTableDecode kKernelsDecodeBf16Int4 = fill_table_decode<__nv_bfloat16, 4, false>();
}  // namespace sparse_marlin
