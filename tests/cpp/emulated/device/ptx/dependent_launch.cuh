#pragma once
#include "emulated/lanes.h"

namespace sparse_marlin::ptx {

inline void grid_dependency_wait() {}
inline void grid_launch_dependents() {}
inline int64_t prefetched_l2 = 0;  // bytes
inline void prefetch_l2(const void* from, uint32_t bytes) {
  emulated::check(reinterpret_cast<uintptr_t>(from) % 16 == 0 && bytes % 16 == 0 && bytes > 0,
                  "not in pieces of 16 bytes");
  prefetched_l2 += bytes;
}

}  // namespace sparse_marlin::ptx
