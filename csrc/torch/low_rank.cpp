// See low_rank.h.
#include "torch/low_rank.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif

#include <algorithm>

#include "plan/low_rank.h"

namespace sparse_marlin {
namespace {

Tensor reshaped(const Tensor& tensor, int64_t rows, int64_t cols) {
  const int64_t shape[] = {rows, cols};
  return torch::stable::view(tensor, torch::headeronly::IntHeaderOnlyArrayRef(shape, 2));
}

// What a packed `up` multiplies: every 64 ranks twice, zeros where there are fewer (plan/low_rank.h).
Tensor twice(Tensor low, int64_t tokens, int64_t rank) {
  const int64_t shape[] = {tokens, tail_tiles(rank) * int64_t{format::kTileCols}};
  Tensor to = torch::stable::new_zeros(low, torch::headeronly::IntHeaderOnlyArrayRef(shape, 2));
  for (int64_t first = 0; first < rank; first += kTailRanks) {
    const int64_t count = std::min<int64_t>(kTailRanks, rank - first);
    const Tensor from = torch::stable::narrow(low, 1, first, count);
    for (int64_t half = 0; half < kHalves; ++half) {
      Tensor part = torch::stable::narrow(to, 1, first * kHalves + half * kHalfCols, count);
      torch::stable::copy_(part, from);
    }
  }
  return to;
}

}  // namespace

Tensor projected(const LowRankCall& call) {
  const Problem& problem = call.gemm.problem;
  Tensor down = call.down;
  return torch::stable::matmul(reshaped(call.gemm.acts, problem.m, problem.k), torch::stable::transpose(down, 0, 1));
}

void add_products(const LowRankCall& call, const std::function<Tensor(const GemmCall&)>& multiply) {
  const Problem& problem = call.gemm.problem;
  const Tensor low = projected(call);
  Tensor out = reshaped(call.gemm.out, problem.m, problem.n);
  if (call.packed) {
    const GemmCall up = gemm_call(twice(low, problem.m, call.down.size(0)), call.up_weights.tensor, *call.up_scales,
                                  problem.group_size, problem.num_bits, std::nullopt, kLowRankOp);
    torch::stable::copy_(out, torch::stable::subtract(out, multiply(up), -1.0));
    return;
  }
  Tensor up = call.up;
  const Tensor up_rows = torch::stable::transpose(up, 0, 1);
#ifdef USE_CUDA
  if (out.is_cuda()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), out.get(), low.get(), up_rows.get(), 1.0, 1.0));
    return;
  }
#endif
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), low.get(), up_rows.get(), 1.0, 1.0));
}

}  // namespace sparse_marlin
