// What the operators answer to CUDA tensors in a build without CUDA. Compiled instead of ops_cuda.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/arguments.h"

namespace sparse_marlin {
namespace {

// Of the arguments, one or more are on a GPU: that is why the dispatcher came here.
[[noreturn]] void no_cuda(std::initializer_list<Arg> args) {
  const Arg* found = args.begin();
  for (const Arg& arg : args)
    if (arg.tensor.is_cuda()) found = &arg;
  fail(found->op, found->name, "a CPU tensor, since this sparse_marlin was built without CUDA",
       "one on " + device_text(found->tensor),
       "rebuild where nvcc and a CUDA build of torch are installed (pip install --no-build-isolation .), or move the "
       "tensors with .cpu()");
}

Tensor pack_no_cuda(const Tensor& weight, const Tensor& scales, int64_t, int64_t) {
  no_cuda({{kPackOp, "scales", scales}, {kPackOp, "weight", weight}});
}
Tensor unpack_no_cuda(const Tensor& packed, int64_t, int64_t, int64_t) {
  no_cuda({{kUnpackOp, "weight_packed", packed}});
}
Tensor gemm_no_cuda(const Tensor& a, const Tensor& weight_packed, const Tensor& scales, int64_t, int64_t,
                    const std::optional<Tensor>&) {
  no_cuda({{kGemmOp, "scales", scales}, {kGemmOp, "weight_packed", weight_packed}, {kGemmOp, "a", a}});
}
Tensor gemm_low_rank_no_cuda(const Tensor& a, const Tensor& weight_packed, const Tensor& scales, const Tensor& down,
                             const Tensor& up, int64_t, int64_t, const std::optional<Tensor>&,
                             const std::optional<Tensor>&, const std::optional<Tensor>&) {
  no_cuda({{kLowRankOp, "up", up},
           {kLowRankOp, "down", down},
           {kLowRankOp, "scales", scales},
           {kLowRankOp, "weight_packed", weight_packed},
           {kLowRankOp, "a", a}});
}
Tensor gemm_prefetch_no_cuda(const Tensor& a, const Tensor& weight_packed, const Tensor& scales,
                             const Tensor& next_packed, int64_t, int64_t, const std::optional<Tensor>&) {
  no_cuda({{kPrefetchOp, "next_packed", next_packed},
           {kPrefetchOp, "scales", scales},
           {kPrefetchOp, "weight_packed", weight_packed},
           {kPrefetchOp, "a", a}});
}
Tensor import_no_cuda(const Tensor& packed, const Tensor& meta, int64_t) {
  no_cuda({{kImportOp, "meta", meta}, {kImportOp, "packed", packed}});
}
std::tuple<Tensor, Tensor> export_no_cuda(const Tensor& packed, int64_t, int64_t, int64_t) {
  no_cuda({{kExportOp, "weight_packed", packed}});
}

}  // namespace
}  // namespace sparse_marlin

STABLE_TORCH_LIBRARY_IMPL(sparse_marlin, CUDA, m) {
  m.impl("pack_24_weights", TORCH_BOX(&sparse_marlin::pack_no_cuda));
  m.impl("unpack_24_weights", TORCH_BOX(&sparse_marlin::unpack_no_cuda));
  m.impl("sparse_marlin_gemm", TORCH_BOX(&sparse_marlin::gemm_no_cuda));
  m.impl("sparse_marlin_gemm_low_rank", TORCH_BOX(&sparse_marlin::gemm_low_rank_no_cuda));
  m.impl("sparse_marlin_gemm_prefetch", TORCH_BOX(&sparse_marlin::gemm_prefetch_no_cuda));
  m.impl("import_marlin_24", TORCH_BOX(&sparse_marlin::import_no_cuda));
  m.impl("export_marlin_24", TORCH_BOX(&sparse_marlin::export_no_cuda));
}
