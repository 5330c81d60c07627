// Instantiates the decode kernel for every tile and every scale mode, without a low-rank correction or with one.
#pragma once
#include <utility>

#include "device/kernel_decode.cuh"
#include "launch/kernel_table_decode.h"

namespace sparse_marlin {

template <typename Act, int kBits, bool kLowRank, int... kIndex>
constexpr KernelTableDecode fill_table_decode(std::integer_sequence<int, kIndex...>) {
  return {{{device::gemm_decode<Act, kBits, kIndex, ScaleMode::kNone, kLowRank>...},
           {device::gemm_decode<Act, kBits, kIndex, ScaleMode::kTiles, kLowRank>...},
           {device::gemm_decode<Act, kBits, kIndex, ScaleMode::kSteps, kLowRank>...}}};
}
template <typename Act, int kBits, bool kLowRank>
constexpr KernelTableDecode fill_table_decode() {
  return fill_table_decode<Act, kBits, kLowRank>(
      std::make_integer_sequence<int, static_cast<int>(kTilesDecode.size())>{});
}

}  // namespace sparse_marlin
