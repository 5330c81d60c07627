// The kernels with AVX2, FMA and F16C. SIMD lanes are rows: a vector holds one kept value of eight rows, and the column
// that each row kept is one of four neighbours, so `vpermilps` of the quad's four activations, controlled by the
// metadata word itself (it reads two bits a lane), brings every row its activation. Nothing is gathered and no dense
// weight is built.
#include "cpu/kernels.h"

#if defined(SPARSE_MARLIN_X86)
#include <immintrin.h>

#include <bit>

#include "cpu/half.h"

#define SPARSE_MARLIN_AVX2 __attribute__((target("avx2,fma,f16c")))
#define SPARSE_MARLIN_AVX2_INLINE __attribute__((target("avx2,fma,f16c"), always_inline)) inline

namespace sparse_marlin::cpu {
namespace {

using namespace format;

constexpr int kHalves = kSliceRows / kHalfRows;  // a vector is one half: rows 0-7 or 8-15
// The words of a slice with rows across lanes.
template <int kBits>
struct Transposed {
  static constexpr int kPlanes = slice_code_words(kBits) / kPlaneWords;
  __m256i codes[kPlanes * kRowCodeWords];  // two's complement: the bias is gone
  __m256i meta[kRowMetaWords];
};

// Four consecutive words of eight rows `row_words` apart, to four vectors of one word of the eight rows.
SPARSE_MARLIN_AVX2_INLINE void transpose_words(const uint32_t* words, int row_words, __m256i* out) {
  __m256i rows[4];  // row i in the low lane, row i + 4 in the high one
  for (int i = 0; i < 4; ++i) {
    const auto* low = reinterpret_cast<const __m128i*>(words + i * row_words);
    const auto* high = reinterpret_cast<const __m128i*>(words + (i + 4) * row_words);
    rows[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)), _mm_loadu_si128(high), 1);
  }
  const __m256i low01 = _mm256_unpacklo_epi32(rows[0], rows[1]), low23 = _mm256_unpacklo_epi32(rows[2], rows[3]);
  const __m256i high01 = _mm256_unpackhi_epi32(rows[0], rows[1]), high23 = _mm256_unpackhi_epi32(rows[2], rows[3]);
  out[0] = _mm256_unpacklo_epi64(low01, low23);
  out[1] = _mm256_unpackhi_epi64(low01, low23);
  out[2] = _mm256_unpacklo_epi64(high01, high23);
  out[3] = _mm256_unpackhi_epi64(high01, high23);
}

template <int kBits>
SPARSE_MARLIN_AVX2_INLINE void transpose(const uint32_t* slice, Transposed<kBits>& out) {
  for (int plane = 0; plane < Transposed<kBits>::kPlanes; ++plane) {
    for (int word = 0; word < kRowCodeWords; word += 4) {
      transpose_words(slice + plane * kPlaneWords + word, kRowCodeWords, out.codes + plane * kRowCodeWords + word);
    }
  }
  for (int word = 0; word < kRowMetaWords; word += 4) {
    transpose_words(slice + slice_code_words(kBits) + word, kRowMetaWords, out.meta + word);
  }
}

// Codes are taken out of their words where they lie, in one half of the word or the other: multiplied by 2^field.
constexpr int kFieldBits = kWordBits / 2;
template <int kBits>
constexpr int field_of(int half, int kept) {
  return code_location(half * kHalfRows, kept, kBits).shift % kFieldBits;
}

SPARSE_MARLIN_AVX2_INLINE __m256 power_of_two(int exponent) {
  return _mm256_castsi256_ps(_mm256_set1_epi32((127 + exponent) << 23));
}

// Kept value `kept` of rows 8 * half .. + 7, times 2^field_of(half, kept). The arguments are constants after unrolling.
// A float of 2^23 counts in ones: a stored code put into its low bits is added to it, and subtracting 2^23 and the bias
// leaves the code. Three instructions for almost any port, where moving the code to the top of its word and back, to
// extend its sign, competes with the permutation and the shift of the metadata for two ports.
template <int kBits>
SPARSE_MARLIN_AVX2_INLINE __m256 code_vector(const Transposed<kBits>& slice, int half, int kept) {
  static_assert(kFieldBits <= 23);
  constexpr float kOnes = 0x1p23f;
  const Location at = code_location(half * kHalfRows, kept, kBits);
  const int field = field_of<kBits>(half, kept);
  const __m256i words = slice.codes[at.word / kPlaneWords * kRowCodeWords + at.word % kPlaneWords];
  const __m256i half_words = at.shift < kFieldBits ? words : _mm256_srli_epi32(words, kFieldBits);
  const __m256i stored = _mm256_and_si256(half_words, _mm256_set1_epi32(((1 << kBits) - 1) << field));
  const __m256 code = _mm256_castsi256_ps(_mm256_or_si256(stored, _mm256_set1_epi32(std::bit_cast<int>(kOnes))));
  return _mm256_sub_ps(code, _mm256_set1_ps(kOnes + static_cast<float>(encode(0, kBits) << field)));
}

// The column of the same inside its quad, in the low two bits.
template <int kBits>
SPARSE_MARLIN_AVX2_INLINE __m256i column_vector(const Transposed<kBits>& slice, int half, int kept) {
  const Location at = meta_location(half * kHalfRows, kept / kKeptPerQuad, kBits);
  const int shift = at.shift + kept % kKeptPerQuad * (kMetaBits / kKeptPerQuad);
  return _mm256_srli_epi32(slice.meta[at.word - slice_code_words(kBits)], shift);
}

SPARSE_MARLIN_AVX2_INLINE __m256 load_quad(const float* quad) {
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(quad));
}

template <int kBits, int kStep>
SPARSE_MARLIN_AVX2_INLINE void decode_step(const Transposed<kBits>& slice, const float* scales, DecodedSlice& out) {
#pragma GCC unroll 2
  for (int half = 0; half < kHalves; ++half) {
    const __m256 scale = _mm256_loadu_ps(scales + half * kHalfRows);
#pragma GCC unroll 16
    for (int i = 0; i < kStepKept; ++i) {
      const int kept = kStep * kStepKept + i, row = half * kHalfRows;
      const __m256 factor = _mm256_mul_ps(scale, power_of_two(-field_of<kBits>(half, kept)));  // a few distinct ones
      _mm256_store_ps(&out.weights[kept][row], _mm256_mul_ps(code_vector(slice, half, kept), factor));
      _mm256_store_si256(reinterpret_cast<__m256i*>(&out.columns[kept][row]), column_vector(slice, half, kept));
    }
  }
}

template <int kBits>
SPARSE_MARLIN_AVX2 void decode_bits(const uint32_t* slice, StepScales scales, DecodedSlice& out) {
  Transposed<kBits> transposed;
  transpose(slice, transposed);
  decode_step<kBits, 0>(transposed, scales[0], out);
  decode_step<kBits, 1>(transposed, scales[1], out);
  decode_step<kBits, 2>(transposed, scales[2], out);
  decode_step<kBits, 3>(transposed, scales[3], out);
}

void decode(const uint32_t* slice, int num_bits, StepScales scales, DecodedSlice& out) {
  static_assert(kSliceSteps == 4);
  num_bits == 4 ? decode_bits<4>(slice, scales, out) : decode_bits<8>(slice, scales, out);
}

// One step of one token: codes are summed first and scaled once, since a step has one scale a row. Each half has two
// sums, one for each power of two that its codes come multiplied by.
template <int kBits, int kStep>
SPARSE_MARLIN_AVX2_INLINE void multiply_one_step(const Transposed<kBits>& slice, const float* scales, const float* acts,
                                                 __m256 (&sums)[kHalves]) {
  constexpr int kSums = 2, kSumBits = kFieldBits / kSums;
  __m256 partial[kHalves][kSums] = {{_mm256_setzero_ps(), _mm256_setzero_ps()},
                                    {_mm256_setzero_ps(), _mm256_setzero_ps()}};
#pragma GCC unroll 8
  for (int q = 0; q < kStepQuads; ++q) {
    // Quads t and t + 4 one after the other: with 4-bit codes they share a word.
    const int quad = kStep * kStepQuads + q % 2 * (kStepQuads / 2) + q / 2;
    const __m256 x = load_quad(acts + quad * kQuad);
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
#pragma GCC unroll 2
      for (int i = 0; i < kKeptPerQuad; ++i) {
        const int kept = quad * kKeptPerQuad + i;
        __m256& sum = partial[half][field_of<kBits>(half, kept) / kSumBits];
        const __m256 mine = _mm256_permutevar_ps(x, column_vector(slice, half, kept));
        sum = _mm256_fmadd_ps(code_vector(slice, half, kept), mine, sum);
      }
    }
  }
#pragma GCC unroll 2
  for (int half = 0; half < kHalves; ++half) {
    const int rest = field_of<kBits>(half, 0) % kSumBits;
    const __m256 step = _mm256_fmadd_ps(partial[half][1], power_of_two(-kSumBits), partial[half][0]);
    const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(scales + half * kHalfRows), power_of_two(-rest));
    sums[half] = _mm256_fmadd_ps(step, scale, sums[half]);
  }
}

template <int kBits>
SPARSE_MARLIN_AVX2 void multiply_one_bits(const uint32_t* slice, StepScales scales, const float* acts, float* sums) {
  Transposed<kBits> transposed;
  transpose(slice, transposed);
  __m256 total[kHalves] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  multiply_one_step<kBits, 0>(transposed, scales[0], acts, total);
  multiply_one_step<kBits, 1>(transposed, scales[1], acts, total);
  multiply_one_step<kBits, 2>(transposed, scales[2], acts, total);
  multiply_one_step<kBits, 3>(transposed, scales[3], acts, total);
  for (int half = 0; half < kHalves; ++half) {
    float* sum = sums + half * kHalfRows;
    _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), total[half]));
  }
}

void multiply_one(const uint32_t* slice, int num_bits, StepScales scales, const float* acts, float* sums) {
  num_bits == 4 ? multiply_one_bits<4>(slice, scales, acts, sums) : multiply_one_bits<8>(slice, scales, acts, sums);
}

// `kTokens` tokens by kHalvesAtOnce vectors of rows: the sums, the weights and the columns fit the 16 registers. Few
// tokens have too few sums to hide the latency of an addition, so first and second values are summed apart.
template <int kTokens, int kHalvesAtOnce>
SPARSE_MARLIN_AVX2_INLINE void multiply_block(const DecodedSlice& slice, int half0, const float* acts, float* sums) {
  constexpr int kChains = kTokens <= 2 ? kKeptPerQuad : 1;
  __m256 partial[kTokens * kHalvesAtOnce * kChains];
#pragma GCC unroll 8
  for (__m256& p : partial) p = _mm256_setzero_ps();
  for (int quad = 0; quad < kSliceQuads; ++quad) {
    __m256 weights[kHalvesAtOnce][kKeptPerQuad];
    __m256i columns[kHalvesAtOnce][kKeptPerQuad];
#pragma GCC unroll 2
    for (int h = 0; h < kHalvesAtOnce; ++h) {
#pragma GCC unroll 2
      for (int i = 0; i < kKeptPerQuad; ++i) {
        const int kept = quad * kKeptPerQuad + i, row = (half0 + h) * kHalfRows;
        weights[h][i] = _mm256_load_ps(&slice.weights[kept][row]);
        columns[h][i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(&slice.columns[kept][row]));
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const __m256 x = load_quad(acts + t * kSliceCols + quad * kQuad);
#pragma GCC unroll 2
      for (int h = 0; h < kHalvesAtOnce; ++h) {
#pragma GCC unroll 2
        for (int i = 0; i < kKeptPerQuad; ++i) {
          __m256& p = partial[(t * kHalvesAtOnce + h) * kChains + i % kChains];
          p = _mm256_fmadd_ps(weights[h][i], _mm256_permutevar_ps(x, columns[h][i]), p);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
    for (int h = 0; h < kHalvesAtOnce; ++h) {
      const __m256* p = &partial[(t * kHalvesAtOnce + h) * kChains];
      float* sum = sums + t * kSliceRows + (half0 + h) * kHalfRows;
      const __m256 slice_sum = kChains == 1 ? p[0] : _mm256_add_ps(p[0], p[kChains - 1]);
      _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), slice_sum));
    }
  }
}

template <int kTokens>
SPARSE_MARLIN_AVX2 void multiply_tokens(const DecodedSlice& slice, const float* acts, float* sums) {
  if constexpr (kTokens <= 4) {
    multiply_block<kTokens, kHalves>(slice, 0, acts, sums);
  } else {
    for (int half = 0; half < kHalves; ++half) multiply_block<kTokens, 1>(slice, half, acts, sums);
  }
}

void multiply(const DecodedSlice& slice, const float* acts, int64_t tokens, float* sums) {
  constexpr int kBlock = 8;
  for (; tokens >= kBlock; tokens -= kBlock, acts += kBlock * kSliceCols, sums += kBlock * kSliceRows) {
    multiply_tokens<kBlock>(slice, acts, sums);
  }
  switch (tokens) {
    case 1: return multiply_tokens<1>(slice, acts, sums);
    case 2: return multiply_tokens<2>(slice, acts, sums);
    case 3: return multiply_tokens<3>(slice, acts, sums);
    case 4: return multiply_tokens<4>(slice, acts, sums);
    case 5: return multiply_tokens<5>(slice, acts, sums);
    case 6: return multiply_tokens<6>(slice, acts, sums);
    case 7: return multiply_tokens<7>(slice, acts, sums);
    default: return;
  }
}

SPARSE_MARLIN_AVX2 void load(const void* from, DType type, int64_t count, float* to) {
  constexpr int kWidth = 8;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    if (type == DType::kFloat32) {
      _mm256_storeu_ps(to + i, _mm256_loadu_ps(static_cast<const float*>(from) + i));
      continue;
    }
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + i));
    _mm256_storeu_ps(to + i, type == DType::kFloat16
                                 ? _mm256_cvtph_ps(halves)
                                 : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
  }
  for (; i < count; ++i) to[i] = load_float(from, type, i);
}

SPARSE_MARLIN_AVX2 void store(const float* from, DType type, int64_t count, void* to) {
  constexpr int kWidth = 8;
  int64_t i = 0;
  if (type != DType::kBFloat16) {
    for (; i + kWidth <= count; i += kWidth) {
      const __m256 values = _mm256_loadu_ps(from + i);
      if (type == DType::kFloat32) {
        _mm256_storeu_ps(static_cast<float*>(to) + i, values);
      } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(to) + i),
                         _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      }
    }
  }
  for (; i < count; ++i) store_float(to, type, i, from[i]);
}

}  // namespace

const Kernels& avx2_kernels() {
  static constexpr Kernels kKernels{decode, multiply, multiply_one, load, store};
  return kKernels;
}

}  // namespace sparse_marlin::cpu
#endif
