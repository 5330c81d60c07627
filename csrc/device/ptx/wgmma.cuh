// Dense wgmma (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"): both operands from shared memory, as descriptors of
// ptx/hopper.cuh. Of a lane, g = lane / 4 and c = lane % 4; sums 4 j .. 4 j + 3 are (g, 8 j + 2 c), (g, 8 j + 2 c + 1), (g + 8, 8 j + 2 c),
// (g + 8, 8 j + 2 c + 1) of the 16 rows of its warp.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sparse_marlin::ptx {

// d += a * b^T: 64 rows of a, 64 rows of b, 16 deep.
template <typename Act>
__device__ __forceinline__ void wgmma_64x64x16(float (&d)[32], uint64_t a, uint64_t b);

#define SPARSE_MARLIN_WGMMA_64(TYPE)                                                                                \
  asm volatile(                                                                                                     \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                                   \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, 0, 0;"                                      \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),      \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),     \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                   \
      : "l"(a), "l"(b))

template <>
__device__ __forceinline__ void wgmma_64x64x16<__half>(float (&d)[32], uint64_t a, uint64_t b) {
  SPARSE_MARLIN_WGMMA_64("f16");
}
template <>
__device__ __forceinline__ void wgmma_64x64x16<__nv_bfloat16>(float (&d)[32], uint64_t a, uint64_t b) {
  SPARSE_MARLIN_WGMMA_64("bf16");
}
#undef SPARSE_MARLIN_WGMMA_64

}  // namespace sparse_marlin::ptx
