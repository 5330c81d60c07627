// What a multiplication is, in plain numbers: out[m, n] = acts[m, k] * weight[n, k]^T (+ bias[n]). No tensor, no torch, no CUDA.
// m tokens, n out features, k in features (dense); group_size counts dense k, kChannelwise means one group a row.
#pragma once
#include <array>
#include <cstdint>
#include <string>

#include "format/packed_24.h"

namespace sparse_marlin {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
constexpr const char* dtype_name(DType t) {
  return t == DType::kFloat32 ? "float32" : t == DType::kFloat16 ? "float16" : "bfloat16";
}

inline constexpr int kChannelwise = -1;
inline constexpr std::array<int, 5> kGroupSizes{kChannelwise, 32, 64, 128, 256};
constexpr bool valid_group_size(int64_t group_size) {
  for (int g : kGroupSizes)
    if (g == group_size) return true;
  return false;
}
// G, the first dimension of `scales`; the last group may be shorter than group_size.
constexpr int64_t num_groups(int64_t k, int64_t group_size) {
  return group_size == kChannelwise ? 1 : (k + group_size - 1) / group_size;
}
// Fewest columns a weight may have: k must be a multiple of it, since 2:4 sparsity speaks of quads.
inline constexpr int kColMultiple = format::kQuad;
inline constexpr int64_t kMaxTokens = 1 << 24;  // 32-bit tile arithmetic in the kernels
inline constexpr int64_t kMaxFeatures = 1 << 24;

struct Problem {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  int group_size = 128;
  int num_bits = 4;
  DType dtype = DType::kFloat16;
  bool has_bias = false;
};

}  // namespace sparse_marlin
