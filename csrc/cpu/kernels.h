// What the CPU multiplication needs of an instruction set: a handful of functions on one slice. gemm_cpu.cpp walks the
// matrix and threads it; each kernels_*.cpp fills one table. Internal to csrc/cpu.
#pragma once
#include <cstdint>

#include "cpu/gemm_cpu.h"
#include "format/packed_24.h"

namespace sparse_marlin::cpu {

inline constexpr int kSliceKept = format::kSliceQuads * format::kKeptPerQuad;

// A slice ready to be multiplied: for every kept value, over the 16 rows, the weight and which of its quad's four
// columns it is in (the low two bits; the others hold anything).
struct DecodedSlice {
  alignas(64) float weights[kSliceKept][format::kSliceRows];
  alignas(64) uint32_t columns[kSliceKept][format::kSliceRows];
};

// The same for bfloat16: of every quad, over the 16 rows in an order of the kernels' own, its two codes, unscaled, and the
// bytes of their activations among the quad's eight.
struct DecodedPairs {
  alignas(64) uint32_t weights[format::kSliceQuads][format::kSliceRows];
  alignas(64) uint32_t bytes[format::kSliceQuads][format::kSliceRows];
};

// The scales of a slice: of every step, over the 16 rows; no group ends inside a step.
using StepScales = const float* const (&)[format::kSliceSteps];

struct Kernels {
  void (*decode)(const uint32_t* slice, int num_bits, StepScales scales, DecodedSlice& out);
  // sums[token][row] += slice * acts[token][column], the slice's 128 columns.
  void (*multiply)(const DecodedSlice& slice, const float* acts, int64_t tokens, float* sums);
  // The same of one token, straight from the packed words.
  void (*multiply_one)(const uint32_t* slice, int num_bits, StepScales scales, const float* acts, float* sums);
  // `count` consecutive elements of dtype `type`, to and from float32.
  void (*load)(const void* from, DType type, int64_t count, float* to);
  void (*store)(const float* from, DType type, int64_t count, void* to);
  // decode and multiply for bfloat16 activations, where the instruction set has products of them; otherwise null.
  void (*decode_pairs)(const uint32_t* slice, int num_bits, DecodedPairs& out) = nullptr;
  void (*multiply_pairs)(const DecodedPairs& slice, StepScales scales, const uint16_t* acts, int64_t tokens,
                         float* sums) = nullptr;
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
#define SPARSE_MARLIN_X86 1
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
#endif

}  // namespace sparse_marlin::cpu
