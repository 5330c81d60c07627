// A thread's share of the output: bias, one rounding, one store.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace sparse_marlin::device {

template <typename Act>
__device__ __forceinline__ float to_float(Act v);
template <>
__device__ __forceinline__ float to_float<__half>(__half v) {
  return __half2float(v);
}
template <>
__device__ __forceinline__ float to_float<__nv_bfloat16>(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
template <typename Act>
__device__ __forceinline__ Act from_float(float v);
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

inline constexpr int kVector = 4;  // features a thread stores at once

// out[0 .. count) = values + bias, rounded; `aligned` says that out may be written 8 bytes at once.
template <typename Act>
__device__ __forceinline__ void store_out(Act* out, const Act* bias, float4 v, int count, bool aligned) {
  float values[kVector] = {v.x, v.y, v.z, v.w};
  if (bias != nullptr) {
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      if (j < count) values[j] += to_float(bias[j]);
  }
  if (aligned && count >= kVector) {
    Act packed[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) packed[j] = from_float<Act>(values[j]);
    uint2 bits;
    memcpy(&bits, packed, sizeof(bits));
    *reinterpret_cast<uint2*>(out) = bits;
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      if (j < count) out[j] = from_float<Act>(values[j]);
  }
}

}  // namespace sparse_marlin::device
