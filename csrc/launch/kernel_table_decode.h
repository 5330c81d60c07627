// The compiled decode kernels, as in kernel_table.h.
#pragma once
#include <array>

#include "device/kernel_args_decode.cuh"
#include "plan/scale_mode.h"
#include "plan/tiles_decode.h"

namespace sparse_marlin {

using GemmKernelDecode = void (*)(device::KernelArgsDecode);
using KernelTableDecode = std::array<std::array<GemmKernelDecode, kTilesDecode.size()>, kScaleModes>;

extern const KernelTableDecode kKernelsDecodeF16Int4;
extern const KernelTableDecode kKernelsDecodeF16Int8;
extern const KernelTableDecode kKernelsDecodeBf16Int4;
extern const KernelTableDecode kKernelsDecodeBf16Int8;

// With a low-rank correction.
extern const KernelTableDecode kKernelsDecodeLowRankF16Int4;
extern const KernelTableDecode kKernelsDecodeLowRankF16Int8;
extern const KernelTableDecode kKernelsDecodeLowRankBf16Int4;
extern const KernelTableDecode kKernelsDecodeLowRankBf16Int8;

}  // namespace sparse_marlin
