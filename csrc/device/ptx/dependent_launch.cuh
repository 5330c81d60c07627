// Programmatic dependent launch (PTX ISA, "griddepcontrol", compute capability 9.0 and up; nothing elsewhere): a kernel launched so
// may start before the kernel before it has finished.
//
// Before its wait a kernel of ours reads weights (and factors of a correction) and nothing else. Who wrote them does not signal early, so it
// was complete before the first of ours behind it started, however many of ours run at once. After the wait the kernel right
// before has finished, and since it has waited itself, so have all before it.
#pragma once
#include <cstdint>

namespace sparse_marlin::ptx {

// The kernels before are finished and their writes visible.
__device__ __forceinline__ void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may start as soon as all blocks have said so or ended.
__device__ __forceinline__ void grid_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Asks L2 for a run of bytes, a multiple of 16; used before the wait.
__device__ __forceinline__ void prefetch_l2(const void* address, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
#endif
}

}  // namespace sparse_marlin::ptx
