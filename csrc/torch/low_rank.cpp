// See low_rank.h.
#include "torch/low_rank.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif

namespace sparse_marlin {
namespace {

Tensor reshaped(const Tensor& tensor, int64_t rows, int64_t cols) {
  const int64_t shape[] = {rows, cols};
  return torch::stable::view(tensor, torch::headeronly::IntHeaderOnlyArrayRef(shape, 2));
}

}  // namespace

void add_products(const LowRankCall& call) {
  const Problem& problem = call.gemm.problem;
  Tensor down = call.down, up = call.up;
  const Tensor low =
      torch::stable::matmul(reshaped(call.gemm.acts, problem.m, problem.k), torch::stable::transpose(down, 0, 1));
  const Tensor out = reshaped(call.gemm.out, problem.m, problem.n), up_rows = torch::stable::transpose(up, 0, 1);
#ifdef USE_CUDA
  if (out.is_cuda()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), out.get(), low.get(), up_rows.get(), 1.0, 1.0));
    return;
  }
#endif
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), low.get(), up_rows.get(), 1.0, 1.0));
}

}  // namespace sparse_marlin
