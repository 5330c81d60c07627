// Instantiates the decode kernel for every tile and every scale mode.
#pragma once
#include <utility>

#include "device/kernel_decode.cuh"
#include "launch/kernel_table_decode.h"

namespace sparse_marlin {

template <typename Act, int kBits, int... kIndex>
constexpr KernelTableDecode fill_table_decode(std::integer_sequence<int, kIndex...>) {
  return {{{device::gemm_decode<Act, kBits, kIndex, ScaleMode::kNone>...},
           {device::gemm_decode<Act, kBits, kIndex, ScaleMode::kTiles>...},
           {device::gemm_decode<Act, kBits, kIndex, ScaleMode::kSteps>...}}};
}
template <typename Act, int kBits>
constexpr KernelTableDecode fill_table_decode() {
  return fill_table_decode<Act, kBits>(std::make_integer_sequence<int, static_cast<int>(kTilesDecode.size())>{});
}

}  // namespace sparse_marlin
