// Packing and unpacking: plain pointers in, plain pointers out. The CPU and CUDA versions write the same bytes and
// report the same error, because both are made of the functions of pack/pack_core.h.
#pragma once
#include <cstdint>
#include <string>

#include "cpu/gemm_cpu.h"
#include "format/problem.h"

namespace sparse_marlin {

enum class WeightType : int { kCodes = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3 };  // kCodes: int8

struct PackParams {
  const void* weight;  // [n, k] row-major, contiguous
  WeightType weight_type;
  const void* scales;  // [num_groups, n] row-major, contiguous; for kCodes only checked
  DType scales_type;
  int64_t n;
  int64_t k;
  int group_size;
  int num_bits;
  uint32_t* packed;  // [row_tiles(n), packed_row_words(k)] contiguous, every word is written
};

struct UnpackParams {
  const uint32_t* packed;  // [row_tiles(n)] x packed_row_words
  int64_t packed_row_words;
  int64_t n;
  int64_t k;
  int num_bits;
  int8_t* codes;  // [n, k] row-major, contiguous
};

// The first thing wrong in row-major order of the weight (scales first). kNone: nothing.
enum class PackFault : int {
  kNone = 0,
  kScale,      // scales[row = group, col = n] is not finite or not > 0
  kNotSparse,  // more than two non-zero values in the quad that starts at (row, col)
  kCodeRange,  // code or value at (row, col) out of range
  kNotFinite,  // weight value at (row, col) is NaN or Inf
  kMetadata,   // unpack: metadata of the quad at (row, col) is not two rising indices
};
struct PackStatus {
  PackFault fault = PackFault::kNone;
  int64_t row = 0;
  int64_t col = 0;
  bool ok() const { return fault == PackFault::kNone; }
};
// The message of a fault, ready to follow "op: argument: ".
std::string describe(const PackStatus& status, int num_bits);

PackStatus pack_cpu(const PackParams& params, const ParallelFor& parallel_for);
PackStatus unpack_cpu(const UnpackParams& params, const ParallelFor& parallel_for);

// On `stream` of the current device; wait for the result to read the status. `error` gets a CUDA error's text, or stays
// empty. Weights and packed rows start at multiples of 16 bytes.
PackStatus pack_cuda(const PackParams& params, void* stream, std::string* error);
PackStatus unpack_cuda(const UnpackParams& params, void* stream, std::string* error);

}  // namespace sparse_marlin
