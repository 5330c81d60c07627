// What has to be said of a kernel once on each device, before it is launched.
#pragma once
#include <cuda_runtime.h>

#include <atomic>

#include "launch/dependent_launch.cuh"
#include "launch/launch.h"

namespace sparse_marlin {

// `registers`, of this kernel and device: what a thread of it has; 0: not prepared yet.
inline cudaError_t prepare_kernel(const void* kernel, int device, std::atomic<int>& registers) {
  if (registers.load(std::memory_order_acquire) > 0) return cudaSuccess;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            device_properties(device).smem_per_block);
  if (status != cudaSuccess) return status;
  // An SM is divided into shared memory and cache as the kernel on it asks; blocks of a kernel that asks otherwise have to wait until it
  // is empty, and none of ours would start beside the end of another. Where there is no dependent launch none does in any case.
  if (device_properties(device).compute_capability >= kDependent) {
    status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (status != cudaSuccess) return status;
  }
  cudaFuncAttributes attributes{};
  status = cudaFuncGetAttributes(&attributes, kernel);
  if (status == cudaSuccess) registers.store(attributes.numRegs, std::memory_order_release);
  return status;
}

}  // namespace sparse_marlin
