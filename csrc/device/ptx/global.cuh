// Stores to shared memory, and reads of global memory that the compiler leaves where they are written (PTX ISA, "st", "ld"). __ldcg is assembly without a memory clobber:
// what the kernel before has just written may be read by it before the wait for it.
#pragma once
#include <cstdint>

namespace sparse_marlin::ptx {

// 16 bytes past L1.
__device__ __forceinline__ uint4 load_global_v4(const void* from) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

// The same through L1, of what no kernel of the stream writes while this one runs: other warps of the block read it, too.
__device__ __forceinline__ uint4 load_global_shared_v4(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_v4(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_shared_v2(uint32_t address, uint2 v) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}

}  // namespace sparse_marlin::ptx
