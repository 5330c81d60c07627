// From marlin-24 bytes to packed_24 and back: plain pointers in, plain pointers out, the CPU and the CUDA version alike to the
// byte. n and k as legacy::valid_shape wants them.
#pragma once
#include <cstdint>
#include <string>

#include "pack/pack_24.h"

namespace sparse_marlin {

struct ImportParams {
  const uint32_t* codes;  // [k / 32, row_words(n)] contiguous
  const uint16_t* meta;   // [k / 32, row_meta(n)] contiguous
  int64_t n;
  int64_t k;
  int num_bits;
  uint32_t* packed;  // [row_tiles(n), packed_row_words(k)] contiguous, every word is written
};

struct ExportParams {
  const uint32_t* packed;  // [row_tiles(n)] x packed_row_words
  int64_t packed_row_words;
  int64_t n;
  int64_t k;
  int num_bits;
  uint32_t* codes;  // contiguous, as above; every word is written
  uint16_t* meta;
};

// The only fault of both is PackFault::kMetadata: the quad, in row-major order the first, whose metadata is not two rising
// indices. Describe it with describe().
PackStatus import_marlin_24_cpu(const ImportParams& params, const ParallelFor& parallel_for);
PackStatus export_marlin_24_cpu(const ExportParams& params, const ParallelFor& parallel_for);
PackStatus import_marlin_24_cuda(const ImportParams& params, void* stream, std::string* error);
PackStatus export_marlin_24_cuda(const ExportParams& params, void* stream, std::string* error);

}  // namespace sparse_marlin
