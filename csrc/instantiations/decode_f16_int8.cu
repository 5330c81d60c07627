// The decode kernel for float16 activations and 8-bit codes, all tiles.
#include "launch/fill_table_decode.cuh"

namespace sparse_marlin {
const KernelTableDecode kKernelsDecodeF16Int8 = fill_table_decode<__half, 8, false>();
}  // namespace sparse_marlin
