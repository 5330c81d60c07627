// Registers of an SM, the same on all that the kernels run on: each of its schedulers shares out its own among its warps.
#pragma once
#include "plan/scale_mode.h"
#include "plan/tiles_decode.h"

namespace sparse_marlin {

inline constexpr int kSchedulers = 4;
inline constexpr int kSchedulerRegisters = 16384;
inline constexpr int kRegisterUnit = 8;  // a thread takes a multiple of it

// Blocks of the decode kernel that an SM's registers hold. With small groups the widest tile with a correction and, with 8 bits, the one of
// most warps have none left for two.
constexpr int blocks_decode(const TileDecode& t, int num_bits, ScaleMode mode, bool low_rank) {
  const bool large = (low_rank && t.slices == 4) || (num_bits == 8 && t.warps() > 8);
  return large && mode == ScaleMode::kSteps ? 1 : t.blocks;
}

}  // namespace sparse_marlin
