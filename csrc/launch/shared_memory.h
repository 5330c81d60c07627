// What a kernel may use of an SM's shared memory.
#pragma once
#include <cuda_runtime.h>

#include <atomic>

#include "launch/launch.h"

namespace sparse_marlin {

// All of it. Set once for a kernel and device, to which `done` belongs.
inline cudaError_t allow_shared_memory(const void* kernel, int device, std::atomic<bool>& done) {
  if (done.load(std::memory_order_acquire)) return cudaSuccess;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            device_properties(device).smem_per_block);
  if (status != cudaSuccess) return status;
  // An SM is divided into shared memory and cache as the kernel on it asks; blocks of a kernel that asks otherwise have to wait until it
  // is empty, and none of ours would start beside the end of another.
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (status == cudaSuccess) done.store(true, std::memory_order_release);
  return status;
}

}  // namespace sparse_marlin
