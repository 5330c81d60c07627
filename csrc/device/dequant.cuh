// Packed codes -> the weights' fragment of an MMA, exactly: every code from -8 to 7, or -128 to 127, is a float16 and a bfloat16.
//
// The bit tricks, with u the stored (biased) code and "p | q" two 16-bit halves of a register:
//   float16   0x6400 | u            is 1024 + u        (ulp 1 there), so subtract 1024 + 8:         4-bit, bits 0-3
//             0x6400 | u << 4       is 1024 + 16 u,    so multiply by 1/16 and subtract 64 + 8:     4-bit, bits 4-7
//             0x6400 | u            is 1024 + u,       so subtract 1024 + 128:                      8-bit
//   bfloat16  0x4300 | u            is 128 + u for u < 128 (ulp 1 there), so subtract 128 + 8:      4-bit
//             8-bit codes have one bit too many for that; split u = low + 128 * top:
//             (0x4300 | low) - (0x4300 | !top << 7) = 128 + low - (128 + 128 * !top) = low + 128 * top - 128
//             where the second is 128 or 256: both exact, and so is their difference.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "device/ptx/mma_sp.cuh"
#include "device/ptx/pairs.cuh"
#include "format/packed_24.h"

namespace sparse_marlin::device {

inline constexpr uint32_t kLutAndOr = (0xf0 & 0xcc) | 0xaa;             // (a & b) | c
inline constexpr uint32_t kLutNotAndOr = (~0xf0 & 0xff & 0xcc) | 0xaa;  // (~a & b) | c

// Arithmetic on two 16-bit values in one register.
template <typename Act>
struct Pair;

template <>
struct Pair<__half> {
  static __device__ __forceinline__ uint32_t sub(uint32_t a, uint32_t b) { return ptx::sub_f16x2(a, b); }
  static __device__ __forceinline__ uint32_t mul(uint32_t a, uint32_t b) { return ptx::mul_f16x2(a, b); }
  static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) { return ptx::fma_f16x2(a, b, c); }
  static __device__ __forceinline__ uint32_t broadcast(uint32_t v) { return __byte_perm(v, 0, 0x1010); }
  static __device__ __forceinline__ float to_float(uint32_t v) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(v)));
  }
  static __device__ __forceinline__ float high_to_float(uint32_t v) {
    return __high2float(*reinterpret_cast<const __half2*>(&v));
  }
  static __device__ __forceinline__ uint32_t of(float low, float high) {  // each rounded
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static constexpr uint32_t kOne = 0x3C003C00;
};

template <>
struct Pair<__nv_bfloat16> {  // sm_80 has the fused form alone
  static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    return ptx::fma_bf16x2(a, b, c);
  }
  static __device__ __forceinline__ uint32_t sub(uint32_t a, uint32_t b) { return fma(b, 0xBF80BF80, a); }
  static __device__ __forceinline__ uint32_t mul(uint32_t a, uint32_t b) { return fma(a, b, 0x80008000); }
  static __device__ __forceinline__ uint32_t broadcast(uint32_t v) { return __byte_perm(v, 0, 0x1010); }
  static __device__ __forceinline__ float to_float(uint32_t v) { return __uint_as_float(v << 16); }
  static __device__ __forceinline__ float high_to_float(uint32_t v) { return __uint_as_float(v & 0xffff0000); }
  static __device__ __forceinline__ uint32_t of(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static constexpr uint32_t kOne = 0x3F803F80;
};

// The codes of one lane for one step, unscaled. words: 4-bit codes one word, 8-bit codes two.
template <typename Act, int kBits>
struct Dequant;

template <>
struct Dequant<__half, 4> {
  static constexpr int kWords = 1;
  static __device__ __forceinline__ ptx::FragA run(const uint32_t (&words)[1]) {
    using P = Pair<__half>;
    const uint32_t w = words[0], v = w >> 8;
    return {{P::sub(ptx::lop3<kLutAndOr>(w, 0x000f000f, 0x64006400), 0x64086408),
             P::fma(ptx::lop3<kLutAndOr>(w, 0x00f000f0, 0x64006400), 0x2C002C00, 0xD480D480),
             P::sub(ptx::lop3<kLutAndOr>(v, 0x000f000f, 0x64006400), 0x64086408),
             P::fma(ptx::lop3<kLutAndOr>(v, 0x00f000f0, 0x64006400), 0x2C002C00, 0xD480D480)}};
  }
};

template <>
struct Dequant<__nv_bfloat16, 4> {
  static constexpr int kWords = 1;
  static __device__ __forceinline__ ptx::FragA run(const uint32_t (&words)[1]) {
    ptx::FragA f;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      f.reg[r] =
          Pair<__nv_bfloat16>::sub(ptx::lop3<kLutAndOr>(words[0] >> (4 * r), 0x000f000f, 0x43004300), 0x43084308);
    }
    return f;
  }
};

template <>
struct Dequant<__half, 8> {
  static constexpr int kWords = 2;
  static __device__ __forceinline__ ptx::FragA run(const uint32_t (&words)[2]) {
    ptx::FragA f;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t spread = __byte_perm(words[r / 2], 0x64646464, r % 2 == 0 ? 0x4140 : 0x4342);
      f.reg[r] = Pair<__half>::sub(spread, 0x64806480);
    }
    return f;
  }
};

template <>
struct Dequant<__nv_bfloat16, 8> {
  static constexpr int kWords = 2;
  static __device__ __forceinline__ ptx::FragA run(const uint32_t (&words)[2]) {
    ptx::FragA f;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t spread = __byte_perm(words[r / 2], 0, r % 2 == 0 ? 0x4140 : 0x4342);
      f.reg[r] = Pair<__nv_bfloat16>::sub(ptx::lop3<kLutAndOr>(spread, 0x007f007f, 0x43004300),
                                          ptx::lop3<kLutNotAndOr>(spread, 0x00800080, 0x43004300));
    }
    return f;
  }
};

// Scales of the two rows of a lane, each in both halves of a register.
struct RowScales {
  uint32_t low;   // row g
  uint32_t high;  // row g + 8
};

template <typename Act>
__device__ __forceinline__ void apply_scales(ptx::FragA& f, const RowScales& s) {
  f.reg[0] = Pair<Act>::mul(f.reg[0], s.low);
  f.reg[1] = Pair<Act>::mul(f.reg[1], s.high);
  f.reg[2] = Pair<Act>::mul(f.reg[2], s.low);
  f.reg[3] = Pair<Act>::mul(f.reg[3], s.high);
}

// The same with both scales in one register, row g in the low half: the multiplication takes either half of an operand for both of
// its values, so nothing has to be spread.
template <typename Act>
__device__ __forceinline__ void apply_packed_scales(ptx::FragA& f, uint32_t scales);

template <>
__device__ __forceinline__ void apply_packed_scales<__half>(ptx::FragA& f, uint32_t scales) {
  const __half2 s = *reinterpret_cast<const __half2*>(&scales);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    __half2& v = *reinterpret_cast<__half2*>(&f.reg[r]);
    v = __hmul2(v, r % 2 == 0 ? __low2half2(s) : __high2half2(s));
  }
}
template <>
__device__ __forceinline__ void apply_packed_scales<__nv_bfloat16>(ptx::FragA& f, uint32_t scales) {
  const __nv_bfloat162 s = *reinterpret_cast<const __nv_bfloat162*>(&scales);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    __nv_bfloat162& v = *reinterpret_cast<__nv_bfloat162*>(&f.reg[r]);
    v = __hmul2(v, r % 2 == 0 ? __low2bfloat162(s) : __high2bfloat162(s));
  }
}

}  // namespace sparse_marlin::device
