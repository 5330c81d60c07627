// What the CPU multiplication needs of an instruction set: a handful of functions on one slice. gemm_cpu.cpp walks the
// matrix and threads it; each kernels_*.cpp fills one table. Internal to csrc/cpu.
#pragma once
#include <cstdint>

#include "cpu/gemm_cpu.h"
#include "format/packed_24.h"

namespace sparse_marlin::cpu {

inline constexpr int kSliceKept = format::kSliceQuads * format::kKeptPerQuad;

// Consecutive words of a row pair: of codes in a plane, of metadata; and all words of a plane.
inline constexpr int kRowCodeWords = format::kLanesPerRow * format::kLaneVectorWords;
inline constexpr int kRowMetaWords = format::kLanesPerRow * format::kMetaLaneWords;
inline constexpr int kPlaneWords = format::kLanes * format::kLaneVectorWords;

// Row g's words lie g * kRow*Words behind row 0's, and rows g and g + 8 share them: what vector kernels transpose by.
constexpr bool rows_are_strided() {
  using namespace format;
  for (int bits : {4, 8}) {
    for (int row = 0; row < kSliceRows; ++row) {
      const int g = row % kHalfRows, half_row = row - g;
      for (int kept = 0; kept < kSliceKept; ++kept) {
        const Location at = code_location(row, kept, bits), first = code_location(half_row, kept, bits);
        const Location meta = meta_location(row, kept / kKeptPerQuad, bits);
        const Location first_meta = meta_location(half_row, kept / kKeptPerQuad, bits);
        if (at.word != first.word + g * kRowCodeWords || at.shift != first.shift) return false;
        if (first.word % kPlaneWords >= kRowCodeWords) return false;
        if (meta.word != first_meta.word + g * kRowMetaWords || meta.shift != first_meta.shift) return false;
      }
    }
  }
  return true;
}
static_assert(rows_are_strided());

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

// The scales of a slice: of every step, over the 16 rows; no group ends inside a step, and steps of one group have the same
// pointer.
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
