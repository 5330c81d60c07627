// The kernels in plain C++, for processors without AVX2: the format's bijections, evaluated at compile time, and loops.
#include <array>

#include "cpu/half.h"
#include "cpu/kernels.h"

namespace sparse_marlin::cpu {
namespace {

using namespace format;

struct Places {
  std::array<std::array<Location, kSliceRows>, kSliceKept> code;
  std::array<std::array<Location, kSliceRows>, kSliceQuads> meta;
};

template <int kBits>
constexpr Places make_places() {
  Places places{};
  for (int row = 0; row < kSliceRows; ++row) {
    for (int kept = 0; kept < kSliceKept; ++kept) places.code[kept][row] = code_location(row, kept, kBits);
    for (int quad = 0; quad < kSliceQuads; ++quad) places.meta[quad][row] = meta_location(row, quad, kBits);
  }
  return places;
}
template <int kBits>
constexpr Places kPlaces = make_places<kBits>();

void decode(const uint32_t* slice, int num_bits, StepScales scales, DecodedSlice& out) {
  const Places& places = num_bits == 4 ? kPlaces<4> : kPlaces<8>;
  const uint32_t code_mask = (1u << num_bits) - 1;
  for (int kept = 0; kept < kSliceKept; ++kept) {
    const float* scale = scales[kept / kStepKept];
    for (int row = 0; row < kSliceRows; ++row) {
      const Location code = places.code[kept][row], meta = places.meta[kept / kKeptPerQuad][row];
      const int value = format::decode(slice[code.word] >> code.shift & code_mask, num_bits);
      const Pattern pattern = meta_pattern(slice[meta.word] >> meta.shift);
      out.weights[kept][row] = static_cast<float>(value) * scale[row];
      out.columns[kept][row] = static_cast<uint32_t>(kept % kKeptPerQuad == 0 ? pattern.first : pattern.second);
    }
  }
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
