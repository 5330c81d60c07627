#pragma once
#include "emulated/lanes.h"

namespace sparse_marlin::ptx {

inline uint4 load_shared_v4(uint32_t address) { return emulated::load<uint4>(address); }
inline uint2 load_shared_v2(uint32_t address) { return emulated::load<uint2>(address); }
inline uint32_t load_shared_32(uint32_t address) { return emulated::load<uint32_t>(address); }
inline uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - device::shared) + emulated::kSharedBase;
}
inline void named_barrier(int id, int threads) { emulated::wait_at(id, threads); }

}  // namespace sparse_marlin::ptx
