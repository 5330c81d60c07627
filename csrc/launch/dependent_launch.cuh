// Starting a kernel that may overlap the end of the kernel before it (device/ptx/dependent_launch.cuh).
#pragma once
#include <cuda_runtime.h>

namespace sparse_marlin {

inline constexpr int kDependent = 90;  // compute capability from which dependent launch exists

// cluster: blocks launched together on neighbouring SMs. Where the GPU knows no dependent launch, an ordinary one.
template <typename Args>
cudaError_t launch_dependent(void (*kernel)(Args), const Args& args, int64_t grid, int threads, int smem_bytes,
                             int cluster, bool dependent, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(grid);
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace sparse_marlin
