// The kernels with AVX-512: all 16 rows of a slice in one vector where tokens share a decoded slice. Decoding,
// conversions and the single token, which wait for memory, are those of AVX2.
#include "cpu/kernels.h"

#if defined(SPARSE_MARLIN_X86)
#include <immintrin.h>

#define SPARSE_MARLIN_AVX512 __attribute__((target("avx512f")))

namespace sparse_marlin::cpu {
namespace {

using namespace format;

// The masked forms with every lane set compile to the plain instructions; GCC 12 warns about its own header for the
// plain forms.
constexpr __mmask16 kAllRows = 0xffff;

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
      const __m512 x = _mm512_maskz_broadcast_f32x4(kAllRows, _mm_loadu_ps(acts + t * kSliceCols + quad * kQuad));
      partial[t] = _mm512_fmadd_ps(first, _mm512_maskz_permutevar_ps(kAllRows, x, first_column), partial[t]);
      partial[t] = _mm512_fmadd_ps(second, _mm512_maskz_permutevar_ps(kAllRows, x, second_column), partial[t]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
    float* sum = sums + t * kSliceRows;
    _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), partial[t]));
  }
}

template <int kTokens>
void multiply_blocks(const DecodedSlice& slice, const float*& acts, int64_t& tokens, float*& sums) {
  for (; tokens >= kTokens; tokens -= kTokens, acts += kTokens * kSliceCols, sums += kTokens * kSliceRows) {
    multiply_tokens<kTokens>(slice, acts, sums);
  }
}

void multiply(const DecodedSlice& slice, const float* acts, int64_t tokens, float* sums) {
  static_assert(sizeof(__m512) == kSliceRows * sizeof(float));
  multiply_blocks<16>(slice, acts, tokens, sums);
  multiply_blocks<8>(slice, acts, tokens, sums);
  multiply_blocks<4>(slice, acts, tokens, sums);
  multiply_blocks<1>(slice, acts, tokens, sums);
}

}  // namespace

const Kernels& avx512_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx2_kernels();
    k.multiply = multiply;
    return k;
  }();
  return kernels;
}

}  // namespace sparse_marlin::cpu
#endif
