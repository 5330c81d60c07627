#pragma once
#include "device/ptx/mma_sp.cuh"

namespace sparse_marlin::ptx {

template <typename Act>
void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto of = emulated::meet<6>({a[0], a[1], a[2], a[3], b[0], b[1]});
  const int g = lane() / 4, c = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int high = i / 2, n = 2 * c + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      sum += double{half_of<Act>(of[4 * g + k % 8 / 2][high + 2 * (k / 8)], k % 2)} *
             half_of<Act>(of[4 * n + k % 8 / 2][4 + k / 8], k % 2);
    }
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace sparse_marlin::ptx
