#pragma once
#include "device/ptx/pairs.cuh"

namespace sparse_marlin::ptx {

struct FragA {
  uint32_t reg[4];
};
struct FragB {
  uint32_t reg[4];
};
struct FragD {
  float reg[4];
};

inline int lane() { return emulated::thread.x % emulated::kLanes; }

// The value in column `column` of the row that starts at `row`.
inline uint32_t matrix_value(uint32_t row, int column) {
  emulated::check(row % 16 == 0, "a row of a matrix starts at a multiple of 16 bytes");
  return emulated::load<uint16_t>(row + column * 2);
}
inline FragB ldmatrix_x4(uint32_t address) {
  const auto rows = emulated::meet<1>({address});
  FragB f;
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = rows[8 * i + lane() / 4][0];
    f.reg[i] = matrix_value(row, 2 * (lane() % 4)) | matrix_value(row, 2 * (lane() % 4) + 1) << 16;
  }
  return f;
}
template <int kCount>
void ldmatrix_trans(uint32_t (&to)[kCount], uint32_t address) {
  const auto rows = emulated::meet<1>({address});
  for (int i = 0; i < kCount; ++i) {
    const int row = 8 * i + 2 * (lane() % 4);
    to[i] = matrix_value(rows[row][0], lane() / 4) | matrix_value(rows[row + 1][0], lane() / 4) << 16;
  }
}

// The fragments are those of the PTX ISA's figures for m16n8k32 with sparsity.
template <typename Act, int kSelector>
void mma_sp(FragD& d, const FragA& a, const FragB& b, uint32_t e) {
  const auto of =
      emulated::meet<9>({a.reg[0], a.reg[1], a.reg[2], a.reg[3], b.reg[0], b.reg[1], b.reg[2], b.reg[3], e});
  const int g = lane() / 4, c = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int high = i / 2, n = 2 * c + i % 2;
    double sum = d.reg[i];
    for (int kept = 0; kept < 16; ++kept) {
      const int quad = kept / 2;
      const uint32_t meta = of[4 * g + 2 * kSelector + quad / 4][8] >> (16 * high + 4 * (quad % 4));
      emulated::check((meta & 3) < (meta >> 2 & 3), "metadata of a quad rises");
      const int k = 4 * quad + (meta >> 2 * (kept % 2) & 3);
      sum += double{half_of<Act>(of[4 * g + kept % 8 / 2][high + 2 * (kept / 8)], kept % 2)} *
             half_of<Act>(of[4 * n + k % 8 / 2][4 + k / 8], k % 2);
    }
    d.reg[i] = static_cast<float>(sum);
  }
}

}  // namespace sparse_marlin::ptx
