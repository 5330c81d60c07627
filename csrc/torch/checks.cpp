// The checks of checks.h and the text of their messages.
#include "torch/checks.h"

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <stdexcept>

namespace sparse_marlin {
namespace {

constexpr uintptr_t kAlignment = 16;  // bytes; the widest load of the kernels

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0; }

template <class Range>
std::string join(const Range& items) {
  std::string text;
  for (const auto item : items) text += (text.empty() ? "" : ", ") + std::to_string(item);
  return "[" + text + "]";
}

}  // namespace

void fail(const char* op, const char* name, const std::string& expected, const std::string& got,
          const std::string& remedy) {
  std::string text = std::string(op) + ": " + name + ": expected " + expected + ", got " + got;
  if (!remedy.empty()) text += "; " + remedy;
  throw std::runtime_error(text);
}

std::string dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(type);
  }
}

std::string shape_text(const Tensor& tensor) { return join(tensor.sizes()); }
std::string shape_text(std::initializer_list<int64_t> shape) { return join(shape); }

std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  const std::string type = tensor.is_cuda() ? "cuda" : "another device type, index ";
  return tensor.is_cuda() ? type + ":" + std::to_string(tensor.get_device_index())
                          : type + std::to_string(tensor.get_device_index());
}

void expect_tensor(const Arg& arg) {
  if (!arg.tensor.defined()) fail(arg.op, arg.name, "a tensor", "None");
}

void expect_dtype(const Arg& arg, std::initializer_list<ScalarType> allowed, const char* remedy) {
  const ScalarType got = arg.tensor.scalar_type();
  for (const ScalarType type : allowed)
    if (type == got) return;
  std::string names;
  for (const ScalarType type : allowed) names += (names.empty() ? "" : " or ") + dtype_text(type);
  fail(arg.op, arg.name, "dtype " + names, dtype_text(got), remedy);
}

void expect_dtype_of(const Arg& arg, const Arg& other) {
  const ScalarType got = arg.tensor.scalar_type(), wanted = other.tensor.scalar_type();
  if (got == wanted) return;
  fail(arg.op, arg.name, "dtype " + dtype_text(wanted) + " (that of " + other.name + ")", dtype_text(got),
       "convert one of the two with .to(dtype)");
}

void expect_device_of(const Arg& arg, const Arg& other) {
  const bool same_type = arg.tensor.is_cpu() == other.tensor.is_cpu() && arg.tensor.is_cuda() == other.tensor.is_cuda();
  if (same_type && (arg.tensor.is_cpu() || arg.tensor.get_device_index() == other.tensor.get_device_index())) return;
  const std::string wanted = device_text(other.tensor);
  fail(arg.op, arg.name, "a tensor on " + wanted + " (the device of " + other.name + ")", device_text(arg.tensor),
       "move it with .to(\"" + wanted + "\")");
}

void expect_dims(const Arg& arg, int64_t dims, const char* meaning) {
  if (arg.tensor.dim() == dims) return;
  fail(arg.op, arg.name, std::to_string(dims) + " dimensions " + meaning, "shape " + shape_text(arg.tensor));
}

bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

void fail_shape(const Arg& arg, std::initializer_list<int64_t> shape, const std::string& meaning) {
  fail(arg.op, arg.name, "shape " + shape_text(shape) + " " + meaning, shape_text(arg.tensor));
}

void expect_num_bits(const char* op, int64_t num_bits) {
  if (num_bits == static_cast<int>(num_bits) && format::valid_bits(static_cast<int>(num_bits))) return;
  fail(op, "num_bits", "4 or 8", std::to_string(num_bits));
}

void expect_group_size(const char* op, int64_t group_size) {
  if (valid_group_size(group_size)) return;
  std::string names;
  for (const int size : kGroupSizes) names += (names.empty() ? "" : ", ") + std::to_string(size);
  fail(op, "group_size", "one of " + names + " (-1: one group a row)", std::to_string(group_size));
}

void expect_out_features(const char* op, const char* name, int64_t n) {
  if (n >= 1 && n <= kMaxFeatures) return;
  fail(op, name, "1.." + std::to_string(kMaxFeatures) + " out features (N)", std::to_string(n));
}

void expect_in_features(const char* op, const char* name, int64_t k) {
  if (k < 1 || k > kMaxFeatures)
    fail(op, name, "1.." + std::to_string(kMaxFeatures) + " in features (K)", std::to_string(k));
  if (k % kColMultiple == 0) return;
  fail(op, name, "a number of in features (K) divisible by " + std::to_string(kColMultiple), std::to_string(k),
       "keep such a layer dense: 2:4 sparsity is defined on whole groups of four");
}

DType core_dtype(ScalarType type) {
  return type == ScalarType::Float ? DType::kFloat32 : type == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

bool is_dense_aligned(const Tensor& tensor) { return tensor.is_contiguous() && aligned(tensor.const_data_ptr()); }

Tensor dense_aligned(const Tensor& tensor) {
  const Tensor dense = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  return aligned(dense.const_data_ptr()) ? dense : torch::stable::clone(dense);
}

PackedRows packed_rows(const Tensor& weight_packed) {
  const int64_t rows = weight_packed.size(0), words = weight_packed.size(1);
  // The stride of a dimension of size 1 means nothing.
  const int64_t stride = rows == 1 ? words : weight_packed.stride(0);
  const bool usable = (words == 1 || weight_packed.stride(1) == 1) && stride >= words &&
                      stride * format::kWordBytes % static_cast<int64_t>(kAlignment) == 0;
  const bool in_place = usable && aligned(weight_packed.const_data_ptr());
  const Tensor tensor = in_place ? weight_packed : torch::stable::clone(torch::stable::contiguous(weight_packed));
  return {tensor, static_cast<const uint32_t*>(tensor.const_data_ptr()), in_place ? stride : words};
}

}  // namespace sparse_marlin
