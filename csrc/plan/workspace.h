// The workspace of a plan: float32 partial sums of the splits, then copies of inputs whose rows do not start at multiples of 16
// bytes, which asynchronous copies need (k not a multiple of 8; n not a multiple of 8 with grouped scales).
#pragma once
#include "format/problem.h"
#include "plan/smem.h"

namespace sparse_marlin {

inline constexpr int kRowElements = kCopyBytes / kActBytes;  // rows start at multiples of it
inline constexpr int64_t kWorkspaceAlign = 256;

constexpr int64_t aligned_row(int64_t elements) { return (elements + kRowElements - 1) / kRowElements * kRowElements; }
constexpr bool acts_need_copy(const Problem& p) { return p.k % kRowElements != 0; }
constexpr bool scales_need_copy(const Problem& p) { return p.group_size != kChannelwise && p.n % kRowElements != 0; }

struct Workspace {  // bytes from the start of the workspace
  int64_t acts;
  int64_t scales;
  int64_t size;
};
constexpr Workspace workspace(const Problem& p, int splits) {
  const auto round = [](int64_t bytes) { return (bytes + kWorkspaceAlign - 1) / kWorkspaceAlign * kWorkspaceAlign; };
  const int64_t partials = splits > 1 ? p.m * p.n * splits * int64_t{sizeof(float)} : 0;
  const int64_t acts = acts_need_copy(p) ? p.m * aligned_row(p.k) * kActBytes : 0;
  const int64_t scales = scales_need_copy(p) ? num_groups(p.k, p.group_size) * aligned_row(p.n) * kActBytes : 0;
  return {round(partials), round(partials) + round(acts), round(partials) + round(acts) + round(scales)};
}

}  // namespace sparse_marlin
