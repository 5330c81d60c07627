// The decode kernel for float16 activations and 4-bit codes, all tiles.
#include "launch/fill_table_decode.cuh"

namespace sparse_marlin {
const KernelTableDecode kKernelsDecodeF16Int4 = fill_table_decode<__half, 4, false>();
}  // namespace sparse_marlin
