#pragma once
#include "emulated/lanes.h"

namespace sparse_marlin::ptx {

template <typename Act>
float half_of(uint32_t pair, int half) {
  return static_cast<float>(bits_as<Act>(static_cast<uint16_t>(pair >> 16 * half)));
}
// of both halves, rounded once
template <typename Act, typename Do>
uint32_t each_half(const Do& act, uint32_t a, uint32_t b, uint32_t c = 0) {
  uint32_t pair = 0;
  for (int h = 0; h < 2; ++h) {
    const double exact = act(double{half_of<Act>(a, h)}, double{half_of<Act>(b, h)}, double{half_of<Act>(c, h)});
    pair |= uint32_t{bits_as<uint16_t>(Act(static_cast<float>(exact)))} << 16 * h;
  }
  return pair;
}

template <uint32_t kTable>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i) {
    if (kTable >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return d;
}
inline uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  return each_half<__half>([](double x, double y, double) { return x - y; }, a, b);
}
inline uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  return each_half<__half>([](double x, double y, double) { return x * y; }, a, b);
}
inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  return each_half<__half>([](double x, double y, double z) { return x * y + z; }, a, b, c);
}
inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  return each_half<__nv_bfloat16>([](double x, double y, double z) { return x * y + z; }, a, b, c);
}

}  // namespace sparse_marlin::ptx
