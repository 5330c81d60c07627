// Instantiates the portable kernel for every tile of the tile table and every scale mode.
#pragma once
#include <utility>

#include "device/kernel_sm80.cuh"
#include "launch/kernel_table.h"

namespace sparse_marlin {

template <typename Act, int kBits, int... kIndex>
constexpr KernelTable fill_table(std::integer_sequence<int, kIndex...>) {
  return {{{device::gemm_sm80<Act, kBits, kIndex, ScaleMode::kNone>...},
           {device::gemm_sm80<Act, kBits, kIndex, ScaleMode::kTiles>...},
           {device::gemm_sm80<Act, kBits, kIndex, ScaleMode::kSteps>...}}};
}
template <typename Act, int kBits>
constexpr KernelTable fill_table() {
  return fill_table<Act, kBits>(std::make_integer_sequence<int, static_cast<int>(kTiles.size())>{});
}

}  // namespace sparse_marlin
