// The operators' CUDA implementations: device guard, current stream, workspace from the caching allocator, plan,
// launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <map>
#include <stdexcept>
#include <tuple>

#include "launch/launch.h"
#include "torch/arguments.h"
#include "torch/low_rank.h"

namespace sparse_marlin {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::accelerator::DeviceGuard;

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// Device memory of one element count, from torch's caching allocator: freed to it when the handle dies, which is safe
// because work of this stream that follows runs after ours.
Tensor device_buffer(const Tensor& like, int64_t count, ScalarType type) {
  return torch::stable::new_empty(like, IntHeaderOnlyArrayRef(&count, 1), type);
}

void expect_no_error(const char* op, const std::string& error) {
  if (!error.empty()) throw std::runtime_error(std::string(op) + ": " + error);
}

Tensor pack_cuda_op(const Tensor& weight, const Tensor& scales, int64_t group_size, int64_t num_bits) {
  const PackCall call = pack_call(weight, scales, group_size, num_bits);
  const DeviceGuard guard(call.packed.get_device_index());
  std::string error;
  const PackStatus status = pack_cuda(call.params, current_stream(weight), &error);
  expect_no_error(kPackOp, error);
  expect_packed(status, call.params.num_bits);
  return call.packed;
}

Tensor unpack_cuda_op(const Tensor& weight_packed, int64_t size_n, int64_t size_k, int64_t num_bits) {
  const UnpackCall call = unpack_call(weight_packed, size_n, size_k, num_bits);
  const DeviceGuard guard(call.codes.get_device_index());
  std::string error;
  const PackStatus status = unpack_cuda(call.params, current_stream(weight_packed), &error);
  expect_no_error(kUnpackOp, error);
  expect_unpacked(status, call.params.num_bits);
  return call.codes;
}

Tensor import_cuda_op(const Tensor& packed, const Tensor& meta, int64_t num_bits) {
  const ImportCall call = import_call(packed, meta, num_bits);
  const DeviceGuard guard(call.packed.get_device_index());
  std::string error;
  const PackStatus status = import_marlin_24_cuda(call.params, current_stream(packed), &error);
  expect_no_error(kImportOp, error);
  expect_imported(status, call.params.num_bits);
  return call.packed;
}

std::tuple<Tensor, Tensor> export_cuda_op(const Tensor& weight_packed, int64_t size_n, int64_t size_k,
                                          int64_t num_bits) {
  const ExportCall call = export_call(weight_packed, size_n, size_k, num_bits);
  const DeviceGuard guard(call.codes.get_device_index());
  std::string error;
  const PackStatus status = export_marlin_24_cuda(call.params, current_stream(weight_packed), &error);
  expect_no_error(kExportOp, error);
  expect_exported(status, call.params.num_bits);
  return {call.codes, call.meta};
}

// `choose` makes the plan from the problem and the device. None where there is nothing to compute.
template <class Choose>
std::optional<Plan> planned(const GemmCall& call, const Choose& choose, const char* op) {
  try {
    const Device& device = device_properties(call.out.get_device_index());
    // Said before the early return, so that an unsupported GPU is not discovered by the first non-empty batch.
    const std::string reason = why_unsupported(call.problem, device);
    if (!reason.empty()) throw std::invalid_argument(reason);
    if (call.problem.m == 0) return {};
    return choose(call.problem, device);
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string(op) + ": a: " + error.what());
  }
}

// factors: for plans with a rank.
void run_plan(const GemmCall& call, const Plan& plan, const char* op, const LowRankFactors& factors = {},
              const NextWeights& next = {}) {
  std::optional<Tensor> workspace;
  GemmParams params = call.params;
  if (plan.workspace_bytes > 0) {
    const int64_t floats =
        (plan.workspace_bytes + static_cast<int64_t>(sizeof(float)) - 1) / static_cast<int64_t>(sizeof(float));
    workspace = device_buffer(call.out, floats, ScalarType::Float);
    params.workspace = workspace->mutable_data_ptr();
  }
  expect_no_error(op, launch(call.problem, plan, params, current_stream(call.out), factors, next));
}

template <class Choose>
Tensor run_gemm(const GemmCall& call, const Choose& choose, const char* op = kGemmOp, const NextWeights& next = {}) {
  const std::optional<Plan> plan = planned(call, choose, op);
  if (plan) run_plan(call, *plan, op, {}, next);
  return call.out;
}

// Planning takes tens of microseconds, and a decoding loop asks for the same few problems again and again.
// rank > 0: with a low-rank correction.
Plan remembered_plan(const Problem& problem, const Device& device, int32_t device_index, int64_t rank = 0,
                     bool packed = false) {
  using Key = std::tuple<int32_t, int64_t, int64_t, int64_t, int, int, DType, int64_t, bool>;
  constexpr size_t kMost = 4096;  // then start afresh: a prompt of every length would be remembered otherwise
  thread_local std::map<Key, Plan> plans;
  const Key key{device_index,     problem.m,     problem.n, problem.k, problem.group_size,
                problem.num_bits, problem.dtype, rank,      packed};
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  if (plans.size() >= kMost) plans.clear();
  const Plan made = rank > 0 ? plan_low_rank(problem, device, rank, packed) : plan(problem, device);
  return plans.emplace(key, made).first->second;
}

Tensor remembered_gemm(const GemmCall& call, const char* op = kGemmOp, const NextWeights& next = {}) {
  const DeviceGuard guard(call.out.get_device_index());
  const auto choose = [&](const Problem& problem, const Device& device) {
    return remembered_plan(problem, device, call.out.get_device_index());
  };
  return run_gemm(call, choose, op, next);
}

Tensor gemm_cuda_op(const Tensor& a, const Tensor& weight_packed, const Tensor& scales, int64_t group_size,
                    int64_t num_bits, const std::optional<Tensor>& bias) {
  return remembered_gemm(gemm_call(a, weight_packed, scales, group_size, num_bits, bias));
}

// Of a slice along K the rows lie apart, with bytes between them that are of no use: no hint.
NextWeights next_weights(const Tensor& next_packed) {
  constexpr int64_t kUnit = 16;  // bytes of which the kernel asks for multiples
  if (!is_dense_aligned(next_packed)) return {};
  return {next_packed.const_data_ptr(), next_packed.numel() * int64_t{format::kWordBytes} / kUnit * kUnit};
}

Tensor gemm_prefetch_cuda_op(const Tensor& a, const Tensor& weight_packed, const Tensor& scales,
                             const Tensor& next_packed, int64_t group_size, int64_t num_bits,
                             const std::optional<Tensor>& bias) {
  const GemmCall call = gemm_call(a, weight_packed, scales, group_size, num_bits, bias, kPrefetchOp);
  expect_next(next_packed, a);
  return remembered_gemm(call, kPrefetchOp, next_weights(next_packed));
}

Tensor gemm_tile_cuda_op(const Tensor& a, const Tensor& weight_packed, const Tensor& scales, int64_t group_size,
                         int64_t num_bits, const std::optional<Tensor>& bias, int64_t tile, int64_t splits,
                         bool dependent) {
  const GemmCall call = gemm_call(a, weight_packed, scales, group_size, num_bits, bias);
  const DeviceGuard guard(call.out.get_device_index());
  return run_gemm(call, [=](const Problem& problem, const Device& device) {
    Plan plan = plan_with_tile(problem, device, static_cast<int>(tile), static_cast<int>(splits));
    plan.dependent = dependent;
    return plan;
  });
}

// The first product of a correction.
Tensor project(const LowRankCall& call, bool dependent) {
  const Problem& problem = call.gemm.problem;
  const int64_t rank = call.down.size(0), shape[] = {problem.m, rank};
  if (!can_project(problem, rank, device_properties(call.gemm.out.get_device_index()))) return projected(call);
  Tensor to = torch::stable::new_empty(call.gemm.acts, IntHeaderOnlyArrayRef(shape, 2));
  expect_no_error(kLowRankOp, launch_project(problem, static_cast<int>(rank), call.gemm.acts.const_data_ptr(),
                                             call.down.const_data_ptr(), to.mutable_data_ptr(), dependent,
                                             current_stream(call.gemm.out)));
  return to;
}

// The multiplication with its correction: in one launch where the plan has a rank, behind a product that projects unless the launch
// does; otherwise two products follow.
template <class Choose>
Tensor run_low_rank(const LowRankCall& call, const Choose& choose, const NextWeights& next = {}) {
  const DeviceGuard guard(call.gemm.out.get_device_index());
  const std::optional<Plan> plan = planned(call.gemm, choose, kLowRankOp);
  if (!plan) return call.gemm.out;
  LowRankFactors factors;
  std::optional<Tensor> projection;
  if (plan->rank > 0) {
    factors.down = call.down.const_data_ptr();
    factors.up = call.packed() ? call.up_weights->words : call.up.const_data_ptr();
    if (call.packed()) {
      factors.up_scales = call.up_scales->const_data_ptr();
      factors.up_row_words = call.up_weights->row_words;
    }
    if (plan->project_blocks == 0) {
      projection = project(call, plan->dependent);
      factors.projected = projection->const_data_ptr();
    }
  }
  run_plan(call.gemm, *plan, kLowRankOp, factors, next);
  if (plan->rank > 0) return call.gemm.out;
  return with_products(call, [](const GemmCall& gemm) { return remembered_gemm(gemm); });
}

Tensor gemm_low_rank_cuda_op(const Tensor& a, const Tensor& weight_packed, const Tensor& scales, const Tensor& down,
                             const Tensor& up, int64_t group_size, int64_t num_bits, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& next_packed, const std::optional<Tensor>& up_scales) {
  const LowRankCall call = low_rank_call(a, weight_packed, scales, down, up, group_size, num_bits, bias, up_scales);
  if (next_packed) expect_next(*next_packed, a, kLowRankOp);
  const auto choose = [&](const Problem& problem, const Device& device) {
    return remembered_plan(problem, device, call.gemm.out.get_device_index(), call.down.size(0), call.packed());
  };
  return run_low_rank(call, choose, next_packed ? next_weights(*next_packed) : NextWeights{});
}

Tensor gemm_low_rank_by_cuda_op(const Tensor& a, const Tensor& weight_packed, const Tensor& scales, const Tensor& down,
                                const Tensor& up, int64_t group_size, int64_t num_bits,
                                const std::optional<Tensor>& bias, int64_t tile, int64_t splits, bool dependent,
                                const std::optional<Tensor>& up_scales) {
  const LowRankCall call = low_rank_call(a, weight_packed, scales, down, up, group_size, num_bits, bias, up_scales);
  return run_low_rank(call, [&](const Problem& problem, const Device& device) {
    Plan chosen = tile < 0 ? plan(problem, device)
                           : plan_low_rank_with_tile(problem, device, call.down.size(0), static_cast<int>(tile),
                                                     static_cast<int>(splits), call.packed());
    chosen.dependent = dependent;
    return chosen;
  });
}

}  // namespace
}  // namespace sparse_marlin

STABLE_TORCH_LIBRARY_IMPL(sparse_marlin, CUDA, m) {
  m.impl("pack_24_weights", TORCH_BOX(&sparse_marlin::pack_cuda_op));
  m.impl("unpack_24_weights", TORCH_BOX(&sparse_marlin::unpack_cuda_op));
  m.impl("sparse_marlin_gemm", TORCH_BOX(&sparse_marlin::gemm_cuda_op));
  m.impl("sparse_marlin_gemm_low_rank", TORCH_BOX(&sparse_marlin::gemm_low_rank_cuda_op));
  m.impl("sparse_marlin_gemm_prefetch", TORCH_BOX(&sparse_marlin::gemm_prefetch_cuda_op));
  m.impl("import_marlin_24", TORCH_BOX(&sparse_marlin::import_cuda_op));
  m.impl("export_marlin_24", TORCH_BOX(&sparse_marlin::export_cuda_op));
  m.impl("_sparse_marlin_gemm_tile", TORCH_BOX(&sparse_marlin::gemm_tile_cuda_op));
  m.impl("_sparse_marlin_gemm_low_rank_by", TORCH_BOX(&sparse_marlin::gemm_low_rank_by_cuda_op));
}
