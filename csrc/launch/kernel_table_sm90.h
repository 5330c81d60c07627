// The compiled Hopper kernels, as in kernel_table.h.
#pragma once
#include <array>

#include "device/kernel_args_sm90.cuh"
#include "plan/scale_mode.h"
#include "plan/tiles_sm90.h"

namespace sparse_marlin {

using GemmKernelSm90 = void (*)(device::KernelArgsSm90);
using KernelTableSm90 = std::array<std::array<GemmKernelSm90, kShapesSm90.size()>, kScaleModes>;

extern const KernelTableSm90 kKernelsSm90F16Int4;
extern const KernelTableSm90 kKernelsSm90F16Int8;
extern const KernelTableSm90 kKernelsSm90Bf16Int4;
extern const KernelTableSm90 kKernelsSm90Bf16Int8;

}  // namespace sparse_marlin
