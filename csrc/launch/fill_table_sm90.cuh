// Instantiates the Hopper kernel for every shape and every scale mode.
#pragma once
#include <utility>

#include "device/kernel_sm90.cuh"
#include "launch/kernel_table_sm90.h"

namespace sparse_marlin {

template <typename Act, int kBits, int... kIndex>
constexpr KernelTableSm90 fill_table_sm90(std::integer_sequence<int, kIndex...>) {
  return {{{device::gemm_sm90<Act, kBits, kIndex, ScaleMode::kNone>...},
           {device::gemm_sm90<Act, kBits, kIndex, ScaleMode::kTiles>...},
           {device::gemm_sm90<Act, kBits, kIndex, ScaleMode::kSteps>...}}};
}
template <typename Act, int kBits>
constexpr KernelTableSm90 fill_table_sm90() {
  return fill_table_sm90<Act, kBits>(std::make_integer_sequence<int, static_cast<int>(kShapesSm90.size())>{});
}

}  // namespace sparse_marlin
