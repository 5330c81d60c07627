// Where a group of scales ends, as kernels care: nowhere in the main loop (channelwise, scaled by the epilogue), after whole
// 128-column tiles (group sizes 128 and 256), or after steps inside a tile (32, 64).
#pragma once
#include "format/problem.h"

namespace sparse_marlin {

enum class ScaleMode : int { kNone, kTiles, kSteps };
inline constexpr int kScaleModes = 3;

constexpr ScaleMode scale_mode(int group_size) {
  return group_size == kChannelwise        ? ScaleMode::kNone
         : group_size >= format::kTileCols ? ScaleMode::kTiles
                                           : ScaleMode::kSteps;
}
// Rows of scales a 128-column tile needs, at most.
constexpr int scale_rows(ScaleMode mode) {
  return mode == ScaleMode::kNone ? 0 : mode == ScaleMode::kTiles ? 1 : format::kSliceSteps;
}

}  // namespace sparse_marlin
