// Flags in global memory, by which blocks of a grid tell each other that data is there. One thread's; the others of its group meet it at
// a barrier before flag_raise and after flag_wait.
#pragma once
#include <cstdint>

namespace sparse_marlin::ptx {

__device__ __forceinline__ void flag_raise(uint64_t* flag, uint64_t token) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(token) : "memory");
}
__device__ __forceinline__ bool flag_raised(const uint64_t* flag, uint64_t token) {
  uint64_t found;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(flag) : "memory");
  return found == token;
}
__device__ __forceinline__ void flag_wait(const uint64_t* flag, uint64_t token) {
  while (!flag_raised(flag, token)) {
  }
}
__device__ __forceinline__ void flag_clear(uint64_t* flag) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(uint64_t{0}) : "memory");
}

}  // namespace sparse_marlin::ptx
