// Maps that describe tensors to the tensor copies of compute capability 9.0.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <array>

namespace sparse_marlin {

// The driver's function, through the runtime, so that nothing links against libcuda.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    constexpr unsigned kCudaVersion = 12000;  // where it first appeared
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, kCudaVersion, cudaEnableDefault, &found);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(entry)
                                                                         : nullptr;
  }();
  return function;
}

// A tensor, described innermost dimension first; strides in bytes, of all dimensions but the innermost.
template <size_t kRank>
struct TensorMap {
  CUtensorMapDataType type;
  const void* data;
  std::array<cuuint64_t, kRank> sizes;
  std::array<cuuint64_t, kRank - 1> strides;
  std::array<cuuint32_t, kRank> box;
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;

  cudaError_t write(CUtensorMap* to) const {
    const EncodeTiled encode = encode_tiled();
    if (encode == nullptr) return cudaErrorCompatNotSupportedOnDevice;
    std::array<cuuint32_t, kRank> steps;
    steps.fill(1);
    const CUresult result = encode(to, type, kRank, const_cast<void*>(data), sizes.data(), strides.data(), box.data(),
                                   steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
  }
};

// Numbers as the driver wants them.
template <typename T>
cuuint64_t size(T value) {
  return static_cast<cuuint64_t>(value);
}
template <typename T>
cuuint32_t extent(T value) {
  return static_cast<cuuint32_t>(value);
}

}  // namespace sparse_marlin
