// The kernels in plain C++, for processors without AVX2.
#include <array>

#include "cpu/half.h"
#include "cpu/kernels.h"

namespace sparse_marlin::cpu {
namespace {

using namespace format;

// Rows g and g + 8 share their words, and row g's lie g times as many words behind row 0's: so for every kept value the
// rows of a half are one loop with constant shifts, which compilers turn into vector code.
constexpr int kRowCodeWords = kLanesPerRow * kLaneVectorWords;
constexpr int kRowMetaWords = kLanesPerRow * kMetaLaneWords;
constexpr int kColumnBits = kMetaBits / kKeptPerQuad;

template <int kBits>
constexpr bool rows_are_strided() {
  for (int row = 0; row < kSliceRows; ++row) {
    const int g = row % kHalfRows;
    for (int kept = 0; kept < kSliceKept; ++kept) {
      const Location at = code_location(row, kept, kBits), first = code_location(row - g, kept, kBits);
      const Location meta = meta_location(row, kept / kKeptPerQuad, kBits);
      const Location first_meta = meta_location(row - g, kept / kKeptPerQuad, kBits);
      if (at.word != first.word + g * kRowCodeWords || at.shift != first.shift) return false;
      if (meta.word != first_meta.word + g * kRowMetaWords || meta.shift != first_meta.shift) return false;
    }
  }
  return true;
}
static_assert(rows_are_strided<4>() && rows_are_strided<8>());

// Word and shift of the first row of every half.
struct Places {
  std::array<std::array<Location, kSliceRows / kHalfRows>, kSliceKept> code;
  std::array<std::array<Location, kSliceRows / kHalfRows>, kSliceKept> column;
};
template <int kBits>
constexpr Places make_places() {
  Places places{};
  for (int kept = 0; kept < kSliceKept; ++kept) {
    for (int half = 0; half < kSliceRows / kHalfRows; ++half) {
      const Location meta = meta_location(half * kHalfRows, kept / kKeptPerQuad, kBits);
      places.code[kept][half] = code_location(half * kHalfRows, kept, kBits);
      places.column[kept][half] = {meta.word, meta.shift + kept % kKeptPerQuad * kColumnBits};
    }
  }
  return places;
}
template <int kBits>
constexpr Places kPlaces = make_places<kBits>();

template <int kBits>
void decode_bits(const uint32_t* __restrict slice, StepScales scales, DecodedSlice& out) {
  for (int kept = 0; kept < kSliceKept; ++kept) {
    for (int half = 0; half < kSliceRows / kHalfRows; ++half) {
      const Location code = kPlaces<kBits>.code[kept][half], column = kPlaces<kBits>.column[kept][half];
      const float* __restrict scale = scales[kept / kStepKept] + half * kHalfRows;
      float* __restrict weights = out.weights[kept] + half * kHalfRows;
      uint32_t* __restrict columns = out.columns[kept] + half * kHalfRows;
      for (int g = 0; g < kHalfRows; ++g) {
        const uint32_t stored = slice[code.word + g * kRowCodeWords] >> code.shift & ((1u << kBits) - 1);
        weights[g] = static_cast<float>(format::decode(stored, kBits)) * scale[g];
        columns[g] = slice[column.word + g * kRowMetaWords] >> column.shift & ((1u << kColumnBits) - 1);
      }
    }
  }
}

void decode(const uint32_t* slice, int num_bits, StepScales scales, DecodedSlice& out) {
  num_bits == 4 ? decode_bits<4>(slice, scales, out) : decode_bits<8>(slice, scales, out);
}

void multiply(const DecodedSlice& slice, const float* acts, int64_t tokens, float* sums) {
  for (int64_t token = 0; token < tokens; ++token) {
    const float* x = acts + token * kSliceCols;
    float partial[kSliceRows] = {};
    for (int kept = 0; kept < kSliceKept; ++kept) {
      const float* quad = x + kept / kKeptPerQuad * kQuad;
      for (int row = 0; row < kSliceRows; ++row) {
        partial[row] += slice.weights[kept][row] * quad[slice.columns[kept][row]];
      }
    }
    for (int row = 0; row < kSliceRows; ++row) sums[token * kSliceRows + row] += partial[row];
  }
}

void multiply_one(const uint32_t* slice, int num_bits, StepScales scales, const float* acts, float* sums) {
  DecodedSlice decoded;
  decode(slice, num_bits, scales, decoded);
  multiply(decoded, acts, 1, sums);
}

void load(const void* from, DType type, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = load_float(from, type, i);
}

void store(const float* from, DType type, int64_t count, void* to) {
  for (int64_t i = 0; i < count; ++i) store_float(to, type, i, from[i]);
}

}  // namespace

const Kernels& portable_kernels() {
  static constexpr Kernels kKernels{decode, multiply, multiply_one, load, store};
  return kKernels;
}

}  // namespace sparse_marlin::cpu
