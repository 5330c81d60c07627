// The inner loops of compression as operators of the CPU (cpu/solve.h). Not part of the contract: only
// sparse_marlin.compress calls them. The schemas are in ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/solve.h"
#include "torch/checks.h"

namespace sparse_marlin {
namespace {

constexpr char kDescendOp[] = "_descend_quads";
constexpr char kProjectOp[] = "_project_quads";

void on_torch_threads(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

void expect_rows(const Arg& arg, int64_t k, int64_t n) {
  expect_tensor(arg);
  expect_dtype(arg, {ScalarType::Float});
  expect_dims(arg, 2, "[K, R]");
  expect_shape(arg, {k, n}, [] { return "of the problem"; });
  if (n > 1 && arg.tensor.stride(1) != 1) fail(arg.op, arg.name, "rows without gaps", "others");
}

void expect_quads(const Arg& arg) {
  expect_dims(arg, 2, "[K, R]");
  const int64_t k = arg.tensor.size(0);
  if (k % format::kQuad != 0) fail(arg.op, arg.name, "whole quads", shape_text(arg.tensor));
}

Rows<const float> read(const Tensor& tensor) {
  return {static_cast<const float*>(tensor.const_data_ptr()), tensor.stride(0)};
}
Rows<float> write(Tensor& tensor) { return {static_cast<float*>(tensor.mutable_data_ptr()), tensor.stride(0)}; }

void descend_quads_op(const Tensor& matrix, const Tensor& gradient, Tensor codes, Tensor moved, int64_t low,
                      int64_t high, double margin) {
  expect_quads({kDescendOp, "gradient", gradient});
  const int64_t k = gradient.size(0), n = gradient.size(1);
  expect_rows({kDescendOp, "matrix", matrix}, k, k);
  expect_rows({kDescendOp, "gradient", gradient}, k, n);
  expect_rows({kDescendOp, "codes", codes}, k, n);
  expect_rows({kDescendOp, "moved", moved}, k, n);
  const DescentParams params{k,
                             n,
                             static_cast<float>(low),
                             static_cast<float>(high),
                             static_cast<float>(margin),
                             read(matrix),
                             read(gradient),
                             write(codes),
                             write(moved)};
  descend_quads(params, on_torch_threads);
}

void project_quads_op(const Tensor& sought, const Tensor& target, const std::optional<Tensor>& step, Tensor carried,
                      Tensor behind, double ratio, int64_t low, int64_t high) {
  expect_quads({kProjectOp, "sought", sought});
  const int64_t k = sought.size(0), n = sought.size(1);
  expect_rows({kProjectOp, "sought", sought}, k, n);
  expect_rows({kProjectOp, "target", target}, k, n);
  if (step) expect_rows({kProjectOp, "step", *step}, k, n);
  expect_rows({kProjectOp, "carried", carried}, k, n);
  expect_rows({kProjectOp, "behind", behind}, k, n);
  const ProjectionParams params{k,
                                n,
                                static_cast<float>(low),
                                static_cast<float>(high),
                                static_cast<float>(ratio),
                                read(sought),
                                read(target),
                                step ? read(*step) : Rows<const float>{},
                                write(carried),
                                write(behind)};
  project_quads(params, on_torch_threads);
}

}  // namespace
}  // namespace sparse_marlin

STABLE_TORCH_LIBRARY_IMPL(sparse_marlin, CPU, m) {
  m.impl("_descend_quads", TORCH_BOX(&sparse_marlin::descend_quads_op));
  m.impl("_project_quads", TORCH_BOX(&sparse_marlin::project_quads_op));
}
