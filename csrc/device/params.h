// GemmParams: all that a GEMM kernel, on the GPU or on the CPU, is given beside its Plan. Filled by torch/ops.cpp.
#pragma once
#include <cstdint>

namespace sparse_marlin {

struct GemmParams {
  const void* acts;           // [m, k] row-major, contiguous, dtype of the problem
  const uint32_t* weights;    // packed_24 [row_tiles(n)] x weights_row_words
  int64_t weights_row_words;  // distance between two rows of tiles, in words; at least packed_row_words(k)
  const void* scales;         // [num_groups, n] contiguous, dtype of the problem
  const void* bias;           // [n] dtype of the problem, or null
  void* out;                  // [m, n] row-major, contiguous, dtype of the problem
  void* workspace;            // Plan::workspace_bytes of device memory, aligned to 256 bytes; null where that is 0
};

}  // namespace sparse_marlin
