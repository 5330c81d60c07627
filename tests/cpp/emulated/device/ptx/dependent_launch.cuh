#pragma once
#include <cstdint>

namespace sparse_marlin::ptx {

inline void grid_dependency_wait() {}
inline void grid_launch_dependents() {}
inline void prefetch_l2(const void*, uint32_t) {}

}  // namespace sparse_marlin::ptx
