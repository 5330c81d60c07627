// See low_rank.h.
#include "torch/low_rank.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif

#include <initializer_list>

#include "plan/low_rank.h"

namespace sparse_marlin {
namespace {

Tensor reshaped(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  return torch::stable::view(tensor, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()));
}

// What a packed `up` multiplies: every 64 ranks twice, zeros where there are fewer (plan/low_rank.h).
Tensor twice(Tensor low, int64_t tokens, int64_t rank) {
  const int64_t tiles = tail_tiles(rank), missing[] = {0, tiles * kTailRanks - rank}, halves[] = {1, 1, kHalves, 1};
  if (missing[1] > 0) low = torch::stable::pad(low, torch::headeronly::IntHeaderOnlyArrayRef(missing, 2));
  // less zeros of another shape: the only operation that spreads a dimension here
  const Tensor zeros = torch::stable::new_zeros(low, torch::headeronly::IntHeaderOnlyArrayRef(halves, 4));
  return reshaped(torch::stable::subtract(reshaped(low, {tokens, tiles, 1, kTailRanks}), zeros),
                  {tokens, tiles * format::kTileCols});
}

}  // namespace

Tensor projected(const LowRankCall& call) {
  const Problem& problem = call.gemm.problem;
  Tensor down = call.down;
  return torch::stable::matmul(reshaped(call.gemm.acts, {problem.m, problem.k}), torch::stable::transpose(down, 0, 1));
}

Tensor with_products(const LowRankCall& call, const std::function<Tensor(const GemmCall&)>& multiply) {
  const Problem& problem = call.gemm.problem;
  const Tensor low = projected(call);
  Tensor out = reshaped(call.gemm.out, {problem.m, problem.n});
  if (call.packed()) {
    const GemmCall up = gemm_call(twice(low, problem.m, call.down.size(0)), call.up_weights->tensor, *call.up_scales,
                                  problem.group_size, problem.num_bits, std::nullopt, kLowRankOp);
    return torch::stable::view(torch::stable::subtract(out, multiply(up), -1.0), call.gemm.out.sizes());
  }
  Tensor up = call.up;
  const Tensor up_rows = torch::stable::transpose(up, 0, 1);
#ifdef USE_CUDA
  if (out.is_cuda()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), out.get(), low.get(), up_rows.get(), 1.0, 1.0));
    return call.gemm.out;
  }
#endif
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), low.get(), up_rows.get(), 1.0, 1.0));
  return call.gemm.out;
}

}  // namespace sparse_marlin
