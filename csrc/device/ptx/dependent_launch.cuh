// Programmatic dependent launch (PTX ISA, "griddepcontrol", compute capability 9.0 and up; nothing elsewhere): a kernel launched so
// may start before the kernel before it has finished.
//
// Every kernel of ours lets its successor start only after its own wait. So when a kernel runs, at most the kernel right before it
// is unfinished, and whatever was complete by then, weights above all, may be read before the wait.
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
