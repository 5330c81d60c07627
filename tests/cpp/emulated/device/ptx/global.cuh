#pragma once
#include "emulated/lanes.h"

namespace sparse_marlin::ptx {

inline uint4 load_global_v4(const void* from) {
  emulated::check(reinterpret_cast<uintptr_t>(from) % sizeof(uint4) == 0, "not aligned");
  return *static_cast<const uint4*>(from);
}
inline void store_shared_v2(uint32_t address, uint2 v) { emulated::store(address, v); }

}  // namespace sparse_marlin::ptx
