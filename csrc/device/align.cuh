// Copies a 16-bit matrix whose rows lie at any place to rows that start at multiples of 16 bytes; the rest of a row becomes zero.
#pragma once
#include <cstdint>

namespace sparse_marlin::device {

inline constexpr int kAlignThreads = 256;

__global__ void __launch_bounds__(kAlignThreads)
    align_rows(const uint16_t* from, uint16_t* to, int64_t rows, int cols, int aligned_cols) {
  const int64_t size = rows * aligned_cols;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kAlignThreads + threadIdx.x; i < size;
       i += static_cast<int64_t>(gridDim.x) * kAlignThreads) {
    const int col = static_cast<int>(i % aligned_cols);
    to[i] = col < cols ? from[i / aligned_cols * cols + col] : uint16_t{0};
  }
}

}  // namespace sparse_marlin::device
