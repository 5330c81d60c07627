// Stores to shared memory, and accesses to global memory that the compiler leaves where they are written (PTX ISA, "ld", "st"). __ldcg and its kin are assembly
// without a memory clobber: what the kernel before has just written may be read by them before the wait for it.
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

// 16 bytes that other blocks see, or do not see, as a whole: a tag in one half vouches for the other.
struct Packet {
  uint64_t payload;
  uint64_t tag;
};
__device__ __forceinline__ Packet load_packet(const void* from) {
  Packet p;
  asm volatile("{\n.reg .b128 v;\nld.relaxed.gpu.global.b128 v, [%2];\nmov.b128 {%0, %1}, v;\n}"
               : "=l"(p.payload), "=l"(p.tag)
               : "l"(from)
               : "memory");
  return p;
}
__device__ __forceinline__ void store_packet(void* to, Packet p) {
  asm volatile("{\n.reg .b128 v;\nmov.b128 v, {%0, %1};\nst.relaxed.gpu.global.b128 [%2], v;\n}" ::"l"(p.payload),
               "l"(p.tag), "l"(to)
               : "memory");
}

// Stores to shared memory by 32-bit address.
__device__ __forceinline__ void store_shared_16(uint32_t address, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}
__device__ __forceinline__ void store_shared_v2(uint32_t address, float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}

}  // namespace sparse_marlin::ptx
