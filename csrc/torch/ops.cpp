// The operators' schemas and their CPU implementations. CUDA: ops_cuda.cpp, or ops_no_cuda.cpp in a build without it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu/gemm_cpu.h"
#include "torch/arguments.h"
#include "torch/low_rank.h"

namespace sparse_marlin {
namespace {

void on_torch_threads(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

Tensor pack_cpu_op(const Tensor& weight, const Tensor& scales, int64_t group_size, int64_t num_bits) {
  const PackCall call = pack_call(weight, scales, group_size, num_bits);
  expect_packed(pack_cpu(call.params, on_torch_threads), call.params.num_bits);
  return call.packed;
}

Tensor unpack_cpu_op(const Tensor& weight_packed, int64_t size_n, int64_t size_k, int64_t num_bits) {
  const UnpackCall call = unpack_call(weight_packed, size_n, size_k, num_bits);
  expect_unpacked(unpack_cpu(call.params, on_torch_threads), call.params.num_bits);
  return call.codes;
}

Tensor gemm_cpu_op(const Tensor& a, const Tensor& weight_packed, const Tensor& scales, int64_t group_size,
                   int64_t num_bits, const std::optional<Tensor>& bias) {
  const GemmCall call = gemm_call(a, weight_packed, scales, group_size, num_bits, bias);
  if (call.problem.m > 0) gemm_cpu(call.problem, call.params, on_torch_threads);
  return call.out;
}

Tensor gemm_low_rank_cpu_op(const Tensor& a, const Tensor& weight_packed, const Tensor& scales, const Tensor& down,
                            const Tensor& up, int64_t group_size, int64_t num_bits, const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& next_packed, const std::optional<Tensor>& up_scales) {
  const LowRankCall call = low_rank_call(a, weight_packed, scales, down, up, group_size, num_bits, bias, up_scales);
  if (next_packed) expect_next(*next_packed, a, kLowRankOp);
  if (call.gemm.problem.m == 0) return call.gemm.out;
  gemm_cpu(call.gemm.problem, call.gemm.params, on_torch_threads);
  return with_products(call, [](const GemmCall& gemm) {
    gemm_cpu(gemm.problem, gemm.params, on_torch_threads);
    return gemm.out;
  });
}

// A CPU's caches are too small for the hint.
Tensor gemm_prefetch_cpu_op(const Tensor& a, const Tensor& weight_packed, const Tensor& scales,
                            const Tensor& next_packed, int64_t group_size, int64_t num_bits,
                            const std::optional<Tensor>& bias) {
  const GemmCall call = gemm_call(a, weight_packed, scales, group_size, num_bits, bias, kPrefetchOp);
  expect_next(next_packed, a);
  if (call.problem.m > 0) gemm_cpu(call.problem, call.params, on_torch_threads);
  return call.out;
}

Tensor import_cpu_op(const Tensor& packed, const Tensor& meta, int64_t num_bits) {
  const ImportCall call = import_call(packed, meta, num_bits);
  expect_imported(import_marlin_24_cpu(call.params, on_torch_threads), call.params.num_bits);
  return call.packed;
}

std::tuple<Tensor, Tensor> export_cpu_op(const Tensor& weight_packed, int64_t size_n, int64_t size_k,
                                         int64_t num_bits) {
  const ExportCall call = export_call(weight_packed, size_n, size_k, num_bits);
  expect_exported(export_marlin_24_cpu(call.params, on_torch_threads), call.params.num_bits);
  return {call.codes, call.meta};
}

std::string cpu_isa_op() { return cpu_isa_name(cpu_isa_best()); }

}  // namespace
}  // namespace sparse_marlin

STABLE_TORCH_LIBRARY(sparse_marlin, m) {
  m.def("pack_24_weights(Tensor weight, Tensor scales, int group_size=128, int num_bits=4) -> Tensor");
  m.def("unpack_24_weights(Tensor weight_packed, int size_n, int size_k, int num_bits=4) -> Tensor");
  m.def(
      "sparse_marlin_gemm(Tensor a, Tensor weight_packed, Tensor scales, int group_size=128, int num_bits=4, "
      "Tensor? bias=None) -> Tensor");
  // The same plus a low-rank correction, (a @ down^T) @ up^T; down [rank, K], up [N, rank], or packed_24 with up_scales
  // (plan/low_rank.h). next_packed: see below.
  m.def(
      "sparse_marlin_gemm_low_rank(Tensor a, Tensor weight_packed, Tensor scales, Tensor down, Tensor up, "
      "int group_size=128, int num_bits=4, Tensor? bias=None, Tensor? next_packed=None, Tensor? up_scales=None) -> "
      "Tensor");
  // sparse_marlin_gemm with a hint: next_packed is what the multiplication after this one reads.
  m.def(
      "sparse_marlin_gemm_prefetch(Tensor a, Tensor weight_packed, Tensor scales, Tensor next_packed, "
      "int group_size=128, int num_bits=4, Tensor? bias=None) -> Tensor");
  // Checkpoints of the old format "marlin-24" (csrc/legacy).
  m.def("import_marlin_24(Tensor packed, Tensor meta, int num_bits=4) -> Tensor");
  m.def("export_marlin_24(Tensor weight_packed, int size_n, int size_k, int num_bits=4) -> (Tensor, Tensor)");
  // Not part of the contract: the same multiplication with the tile and the number of splits given, and with or
  // without dependent launch, for tests and for tuning.
  m.def(
      "_sparse_marlin_gemm_tile(Tensor a, Tensor weight_packed, Tensor scales, int group_size, int num_bits, Tensor? "
      "bias, "
      "int tile, int splits, bool dependent=True) -> Tensor");
  // The correction in the launch of a tile, or by two products (tile < 0).
  m.def(
      "_sparse_marlin_gemm_low_rank_by(Tensor a, Tensor weight_packed, Tensor scales, Tensor down, Tensor up, "
      "int group_size, int num_bits, Tensor? bias, int tile, int splits, bool dependent=True, Tensor? up_scales=None) "
      "-> Tensor");
  m.def("_cpu_isa() -> str");
  // Inner loops of compression, on a CPU (ops_solve.cpp).
  m.def(
      "_descend_quads(Tensor matrix, Tensor gradient, Tensor(a!) codes, Tensor(b!) moved, int low, int high, "
      "float margin) -> ()");
  m.def(
      "_project_quads(Tensor sought, Tensor target, Tensor? step, Tensor(a!) carried, Tensor(b!) behind, float ratio, "
      "int low, int high) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_marlin, CPU, m) {
  m.impl("pack_24_weights", TORCH_BOX(&sparse_marlin::pack_cpu_op));
  m.impl("unpack_24_weights", TORCH_BOX(&sparse_marlin::unpack_cpu_op));
  m.impl("sparse_marlin_gemm", TORCH_BOX(&sparse_marlin::gemm_cpu_op));
  m.impl("sparse_marlin_gemm_low_rank", TORCH_BOX(&sparse_marlin::gemm_low_rank_cpu_op));
  m.impl("sparse_marlin_gemm_prefetch", TORCH_BOX(&sparse_marlin::gemm_prefetch_cpu_op));
  m.impl("import_marlin_24", TORCH_BOX(&sparse_marlin::import_cpu_op));
  m.impl("export_marlin_24", TORCH_BOX(&sparse_marlin::export_cpu_op));
}

STABLE_TORCH_LIBRARY_IMPL(sparse_marlin, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&sparse_marlin::cpu_isa_op));
}
