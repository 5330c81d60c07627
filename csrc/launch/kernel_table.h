// The compiled kernels: one entry a scale mode and tile, for each activation type and code width. Filled by instantiations/ from
// the tile table.
#pragma once
#include <array>

#include "device/kernel_args.h"
#include "plan/scale_mode.h"
#include "plan/tiles.h"

namespace sparse_marlin {

using GemmKernel = void (*)(device::KernelArgs);
using KernelTable = std::array<std::array<GemmKernel, kTiles.size()>, kScaleModes>;

extern const KernelTable kKernelsF16Int4;
extern const KernelTable kKernelsF16Int8;
extern const KernelTable kKernelsBf16Int4;
extern const KernelTable kKernelsBf16Int8;

}  // namespace sparse_marlin
