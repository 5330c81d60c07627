// Loads from global memory past L1 that the compiler leaves where they are written. __ldcg and its kin are assembly without a memory
// clobber: what another kernel or another block has just written may be read by them before the wait for it (PTX ISA, "ld").
#pragma once
#include <cstdint>

namespace sparse_marlin::ptx {

__device__ __forceinline__ uint4 load_global_v4(const void* from) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ uint16_t load_global_16(const void* from) {
  uint16_t v;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(from) : "memory");
  return v;
}

}  // namespace sparse_marlin::ptx
