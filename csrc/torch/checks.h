// What every operator checks of its tensor arguments, and the one form of its messages:
//   op: argument: expected ..., got ...[; remedy]
// A check is handed the tensor itself and reads the actual value from it, so a message cannot speak of another tensor.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>

#include "format/problem.h"

namespace sparse_marlin {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor argument, with the names to use in messages.
struct Arg {
  const char* op;
  const char* name;
  const Tensor& tensor;
};

// Throws std::runtime_error (RuntimeError in Python).
[[noreturn]] void fail(const char* op, const char* name, const std::string& expected, const std::string& got,
                       const std::string& remedy = "");

// As Python writes them: "float16", "[2, 3]", "cuda:0".
std::string dtype_text(ScalarType type);
std::string shape_text(const Tensor& tensor);
std::string shape_text(std::initializer_list<int64_t> shape);
std::string device_text(const Tensor& tensor);

// None: TorchScript and the dispatcher let it pass for a Tensor.
void expect_tensor(const Arg& arg);
void expect_dtype(const Arg& arg, std::initializer_list<ScalarType> allowed, const char* remedy = "");
void expect_dtype_of(const Arg& arg, const Arg& other);
void expect_device_of(const Arg& arg, const Arg& other);
void expect_dims(const Arg& arg, int64_t dims, const char* meaning);
bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape);
[[noreturn]] void fail_shape(const Arg& arg, std::initializer_list<int64_t> shape, const std::string& meaning);
// `meaning` returns the text that explains the numbers: composed only when it is needed, since this is on every call's
// path.
template <class Meaning>
void expect_shape(const Arg& arg, std::initializer_list<int64_t> shape, const Meaning& meaning) {
  if (!has_shape(arg.tensor, shape)) fail_shape(arg, shape, meaning());
}

void expect_num_bits(const char* op, int64_t num_bits);
void expect_group_size(const char* op, int64_t group_size);
// N and K of an argument: in range, K in whole quads. `name` is the argument that the number was read from.
void expect_out_features(const char* op, const char* name, int64_t n);
void expect_in_features(const char* op, const char* name, int64_t k);

// float32, float16 or bfloat16 as the core calls it.
DType core_dtype(ScalarType type);

// The tensor itself, or a copy, so that it is contiguous and its first byte lies on a 16-byte boundary (the kernels'
// widest access).
Tensor dense_aligned(const Tensor& tensor);
bool is_dense_aligned(const Tensor& tensor);  // it would be the tensor itself

// packed_24 bytes as the kernels take them: a row of tiles is contiguous, rows may be further apart than they are long,
// so a slice of a larger packed tensor along either dimension is used where it lies. Copied only where that does not
// hold.
struct PackedRows {
  Tensor tensor;
  const uint32_t* words;
  int64_t row_words;
};
PackedRows packed_rows(const Tensor& weight_packed);

}  // namespace sparse_marlin
