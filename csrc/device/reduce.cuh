// Adds the splits' float32 partial sums in a fixed order, then bias and one rounding: bitwise the same from run to run.
#pragma once
#include "device/epilogue.cuh"
#include "device/ptx/dependent_launch.cuh"

namespace sparse_marlin::device {

inline constexpr int kReduceThreads = 256;

template <typename Act>
__global__ void __launch_bounds__(kReduceThreads) reduce_splits(const __grid_constant__ KernelArgs args) {
  ptx::grid_dependency_wait();  // the partial sums are there
  ptx::grid_launch_dependents();
  const int64_t size = static_cast<int64_t>(args.m) * args.n;
  const bool aligned = args.n % kVector == 0;
  const int row_vectors = (args.n + kVector - 1) / kVector;
  const int64_t vectors = static_cast<int64_t>(args.m) * row_vectors;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x; i < vectors;
       i += static_cast<int64_t>(gridDim.x) * kReduceThreads) {
    const int n = static_cast<int>(i % row_vectors) * kVector, count = min(kVector, args.n - n);
    const int64_t at = i / row_vectors * args.n + n;
    float4 v = {0, 0, 0, 0};
    for (int s = 0; s < args.splits; ++s) {
      const float* partial = args.partials + s * size + at;
      if (aligned) {
        const float4 u = *reinterpret_cast<const float4*>(partial);
        v = {v.x + u.x, v.y + u.y, v.z + u.z, v.w + u.w};
      } else {
        v.x += partial[0];
        if (count > 1) v.y += partial[1];
        if (count > 2) v.z += partial[2];
        if (count > 3) v.w += partial[3];
      }
    }
    const Act* bias = static_cast<const Act*>(args.params.bias);
    store_out(static_cast<Act*>(args.params.out) + at, bias == nullptr ? nullptr : bias + n, v, count, aligned);
  }
}

}  // namespace sparse_marlin::device
