// The kernels with AVX-512: all 16 rows of a slice in one vector. Decoding for several tokens and conversions are those of
// AVX2.
#include "cpu/rows_avx512.h"

#if defined(SPARSE_MARLIN_X86)

#define SPARSE_MARLIN_AVX512 __attribute__((target("avx512f")))

namespace sparse_marlin::cpu {
namespace {

template <int kTokens>
SPARSE_MARLIN_AVX512 void multiply_tokens(const DecodedSlice& slice, const float* acts, float* sums) {
  __m512 partial[kTokens];
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) partial[t] = _mm512_setzero_ps();
  for (int quad = 0; quad < kSliceQuads; ++quad) {
    const int kept = quad * kKeptPerQuad;
    const __m512 first = _mm512_load_ps(slice.weights[kept]), second = _mm512_load_ps(slice.weights[kept + 1]);
    const __m512i first_column = _mm512_load_si512(slice.columns[kept]);
    const __m512i second_column = _mm512_load_si512(slice.columns[kept + 1]);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      const __m512 x = _mm512_maskz_broadcast_f32x4(kAll, _mm_loadu_ps(acts + t * kSliceCols + quad * kQuad));
      partial[t] = _mm512_fmadd_ps(first, _mm512_maskz_permutevar_ps(kAll, x, first_column), partial[t]);
      partial[t] = _mm512_fmadd_ps(second, _mm512_maskz_permutevar_ps(kAll, x, second_column), partial[t]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
    float* sum = sums + t * kSliceRows;
    _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), partial[t]));
  }
}

void multiply(const DecodedSlice& slice, const float* acts, int64_t tokens, float* sums) {
  static_assert(sizeof(__m512) == kSliceRows * sizeof(float));
  for_blocks<16, 8, 4, 1>(acts, tokens, sums, [&]<int kTokens>(const float* block, float* block_sums) {
    multiply_tokens<kTokens>(slice, block, block_sums);
  });
}

constexpr std::array<float, 16> stored_codes() {
  std::array<float, 16> table{};
  for (int i = 0; i < 16; ++i) table[i] = static_cast<float>(i - static_cast<int>(encode(0, 4)));
  return table;
}
alignas(64) constexpr std::array<float, 16> kStoredCodes = stored_codes();

// One token: codes are summed first and scaled once a step. First and second values, and neighbouring quads, are summed
// apart, so that an addition does not wait for the one before it.
template <int kBits>
SPARSE_MARLIN_AVX512 void multiply_one_bits(const uint32_t* slice, StepScales scales, const float* acts, float* sums) {
  SliceRows<kBits> rows;
  rows.load(slice);
  const __m512 table = _mm512_load_ps(kStoredCodes.data());
  const __m512i row_of_lane = _mm512_loadu_si512(kRowOfLane.data());
  constexpr int kChains = 2;
  __m512 total = _mm512_loadu_ps(sums);
#pragma GCC unroll 4
  for (int step = 0; step < kSliceSteps; ++step) {
    __m512 partial[kChains][kKeptPerQuad] = {{_mm512_setzero_ps(), _mm512_setzero_ps()},
                                             {_mm512_setzero_ps(), _mm512_setzero_ps()}};
#pragma GCC unroll 8
    for (int q = 0; q < kStepQuads; ++q) {
      const int quad = step * kStepQuads + q;
      const __m512 x = _mm512_maskz_broadcast_f32x4(kAll, _mm_loadu_ps(acts + quad * kQuad));
#pragma GCC unroll 2
      for (int i = 0; i < kKeptPerQuad; ++i) {
        const __m512i words = rows.code_words(quad, i);
        // the permutation reads four bits
        const __m512 code = kBits == 4 ? _mm512_maskz_permutexvar_ps(kAll, words, table) : float_of_8(words);
        const __m512 mine = _mm512_maskz_permutevar_ps(kAll, x, rows.meta_words(quad, i));
        partial[q % kChains][i] = _mm512_fmadd_ps(code, mine, partial[q % kChains][i]);
      }
    }
    const __m512 sum =
        _mm512_add_ps(_mm512_add_ps(partial[0][0], partial[0][1]), _mm512_add_ps(partial[1][0], partial[1][1]));
    total = _mm512_fmadd_ps(_mm512_maskz_permutexvar_ps(kAll, row_of_lane, sum), _mm512_loadu_ps(scales[step]), total);
  }
  _mm512_storeu_ps(sums, total);
}

void multiply_one(const uint32_t* slice, int num_bits, StepScales scales, const float* acts, float* sums) {
  num_bits == 4 ? multiply_one_bits<4>(slice, scales, acts, sums) : multiply_one_bits<8>(slice, scales, acts, sums);
}

}  // namespace

const Kernels& avx512_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx2_kernels();
    k.multiply = multiply;
    k.multiply_one = multiply_one;
    return k;
  }();
  return kernels;
}

}  // namespace sparse_marlin::cpu
#endif
