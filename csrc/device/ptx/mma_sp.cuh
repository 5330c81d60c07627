// mma.sp::ordered_metadata.m16n8k32 (PTX ISA, "Warp-level matrix instructions: mma.sp") and the ldmatrix that feeds it.
// Instruction letters a, b, d, e appear here and nowhere else: a = sparse operand (our weights), b = dense operand (activations).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sparse_marlin::ptx {

struct FragA {  // 16 rows x 16 kept values
  uint32_t reg[4];
};
struct FragB {  // 32 columns x 8 tokens
  uint32_t reg[4];
};
struct FragD {  // 16 rows x 8 tokens, float32: (g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1)
  float reg[4];
};

// Four 8 x 8 matrices of 16-bit values; lane l names the row l % 8 of matrix l / 8.
__device__ __forceinline__ FragB ldmatrix_x4(uint32_t address) {
  FragB f;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f.reg[0]), "=r"(f.reg[1]), "=r"(f.reg[2]), "=r"(f.reg[3])
               : "r"(address));
  return f;
}

// Transposed: of matrix i, lane l gets (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4). As many matrices as registers.
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&to)[1], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(address));
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&to)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(address));
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}

// d += a * b. kSelector: which half of the lanes' metadata registers belongs to this step (0: lanes c = 0, 1; 1: c = 2, 3).
template <typename Act, int kSelector>
__device__ __forceinline__ void mma_sp(FragD& d, const FragA& a, const FragB& b, uint32_t e);

template <int kSelector>
__device__ __forceinline__ void mma_sp_f16(FragD& d, const FragA& a, const FragB& b, uint32_t e) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d.reg[0]), "+f"(d.reg[1]), "+f"(d.reg[2]), "+f"(d.reg[3])
      : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]), "r"(b.reg[1]), "r"(b.reg[2]),
        "r"(b.reg[3]), "r"(e), "n"(kSelector));
}
template <int kSelector>
__device__ __forceinline__ void mma_sp_bf16(FragD& d, const FragA& a, const FragB& b, uint32_t e) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d.reg[0]), "+f"(d.reg[1]), "+f"(d.reg[2]), "+f"(d.reg[3])
      : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]), "r"(b.reg[1]), "r"(b.reg[2]),
        "r"(b.reg[3]), "r"(e), "n"(kSelector));
}
template <>
__device__ __forceinline__ void mma_sp<__half, 0>(FragD& d, const FragA& a, const FragB& b, uint32_t e) {
  mma_sp_f16<0>(d, a, b, e);
}
template <>
__device__ __forceinline__ void mma_sp<__half, 1>(FragD& d, const FragA& a, const FragB& b, uint32_t e) {
  mma_sp_f16<1>(d, a, b, e);
}
template <>
__device__ __forceinline__ void mma_sp<__nv_bfloat16, 0>(FragD& d, const FragA& a, const FragB& b, uint32_t e) {
  mma_sp_bf16<0>(d, a, b, e);
}
template <>
__device__ __forceinline__ void mma_sp<__nv_bfloat16, 1>(FragD& d, const FragA& a, const FragB& b, uint32_t e) {
  mma_sp_bf16<1>(d, a, b, e);
}

}  // namespace sparse_marlin::ptx
