// A slice's packed words with its 16 rows across the lanes of AVX-512, for the kernels that use it.
#pragma once
#include "cpu/kernels.h"

#if defined(SPARSE_MARLIN_X86)
#include <immintrin.h>

#include <array>
#include <bit>

#define SPARSE_MARLIN_AVX512_INLINE __attribute__((target("avx512f"), always_inline)) inline

namespace sparse_marlin::cpu {

using namespace format;

inline constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns about its own header for the forms without a mask
inline constexpr __mmask8 kAll64 = 0xff;

// Lanes of a vector of rows: the transposition below leaves them in this order. Its own inverse.
inline constexpr std::array<int, kSliceRows> kRowOfLane{0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15};
constexpr bool own_inverse() {
  for (int i = 0; i < kSliceRows; ++i) {
    if (kRowOfLane[kRowOfLane[i]] != i) return false;
  }
  return true;
}
static_assert(own_inverse());

// What follows relies on besides: where a quad's codes are in their word, which rows g and g + 8 share, depends on which of
// the two rows it is alone.
template <int kBits>
inline constexpr int kSecondRow = kBits == 4 ? 4 : 16;  // bits from a code of row g to the one of row g + 8
inline constexpr int kMetaSecondRow = 16;
template <int kBits>
constexpr bool quads_share_words() {
  constexpr int kSecond = kBits == 4 ? 16 : 8;  // bits from a first code to its second
  for (int quad = 0; quad < kSliceQuads; ++quad) {
    const Location at = code_location(0, quad * kKeptPerQuad, kBits), meta = meta_location(0, quad, kBits);
    for (int half = 0; half < kSliceRows / kHalfRows; ++half) {
      const int row = half * kHalfRows;
      const Location first = code_location(row, quad * kKeptPerQuad, kBits);
      const Location second = code_location(row, quad * kKeptPerQuad + 1, kBits);
      const Location mine = meta_location(row, quad, kBits);
      if (first.word != at.word || first.shift != at.shift + half * kSecondRow<kBits>) return false;
      if (second.word != at.word || second.shift != first.shift + kSecond) return false;
      if (mine.word != meta.word || mine.shift != meta.shift + half * kMetaSecondRow) return false;
    }
  }
  return true;
}
static_assert(quads_share_words<4>() && quads_share_words<8>());

// Words 4i + c, i < kVectors, of eight rows `row_words` apart, in the order of the lanes: out[4i + c]. A word is there
// for both of its rows, for the second one shifted by kSecondRow bits, so that both have what is theirs in one place.
template <int kVectors, int kSecondRow>
SPARSE_MARLIN_AVX512_INLINE void transpose(const uint32_t* words, int row_words, __m512i* out) {
  constexpr __mmask16 kRead = (1u << 4 * kVectors) - 1;
  __m512i rows[kHalfRows];
  for (int g = 0; g < kHalfRows; ++g) rows[g] = _mm512_maskz_loadu_epi32(kRead, words + g * row_words);
  __m512i by_word[2][4];  // [rows 0-3, rows 4-7][c]: 128-bit lane i has word 4i + c
  for (int h = 0; h < 2; ++h) {
    const __m512i* r = rows + h * 4;
    const __m512i low01 = _mm512_maskz_unpacklo_epi32(kAll, r[0], r[1]);
    const __m512i low23 = _mm512_maskz_unpacklo_epi32(kAll, r[2], r[3]);
    const __m512i high01 = _mm512_maskz_unpackhi_epi32(kAll, r[0], r[1]);
    const __m512i high23 = _mm512_maskz_unpackhi_epi32(kAll, r[2], r[3]);
    by_word[h][0] = _mm512_maskz_unpacklo_epi64(kAll64, low01, low23);
    by_word[h][1] = _mm512_maskz_unpackhi_epi64(kAll64, low01, low23);
    by_word[h][2] = _mm512_maskz_unpacklo_epi64(kAll64, high01, high23);
    by_word[h][3] = _mm512_maskz_unpackhi_epi64(kAll64, high01, high23);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = by_word[0][c], b = by_word[1][c];
    out[c] = _mm512_maskz_shuffle_i32x4(kAll, a, b, 0x00);
    out[4 + c] = _mm512_maskz_shuffle_i32x4(kAll, a, b, 0x55);
    if constexpr (kVectors > 2) {
      out[8 + c] = _mm512_maskz_shuffle_i32x4(kAll, a, b, 0xaa);
      out[12 + c] = _mm512_maskz_shuffle_i32x4(kAll, a, b, 0xff);
    }
  }
  constexpr __mmask16 kSecondRows = 0xf0f0;
  for (int i = 0; i < 4 * kVectors; ++i) out[i] = _mm512_mask_srli_epi32(out[i], kSecondRows, out[i], kSecondRow);
}

template <int kBits>
struct SliceRows {
  static constexpr int kPlanes = slice_code_words(kBits) / kPlaneWords;
  __m512i codes[kPlanes * kRowCodeWords];
  __m512i meta[kRowMetaWords];

  SPARSE_MARLIN_AVX512_INLINE void load(const uint32_t* slice) {
    for (int plane = 0; plane < kPlanes; ++plane) {
      transpose<kRowCodeWords / 4, kSecondRow<kBits>>(slice + plane * kPlaneWords, kRowCodeWords,
                                                      codes + plane * kRowCodeWords);
    }
    transpose<kRowMetaWords / 4, kMetaSecondRow>(slice + slice_code_words(kBits), kRowMetaWords, meta);
  }
  // Of a quad, a constant after unrolling: the rows' words, with kept value `i`'s code in the lowest bits.
  SPARSE_MARLIN_AVX512_INLINE __m512i code_words(int quad, int i) const {
    const Location at = code_location(0, quad * kKeptPerQuad + i, kBits);
    const __m512i words = codes[at.word / kPlaneWords * kRowCodeWords + at.word % kPlaneWords];
    return _mm512_maskz_srli_epi32(kAll, words, static_cast<unsigned>(at.shift));
  }
  // With kept value `i`'s column in the quad in the lowest two bits; of the first, the nibble in the lowest four.
  SPARSE_MARLIN_AVX512_INLINE __m512i meta_words(int quad, int i) const {
    const Location at = meta_location(0, quad, kBits);
    const int shift = at.shift + i * (kMetaBits / kKeptPerQuad);
    return _mm512_maskz_srli_epi32(kAll, meta[at.word - slice_code_words(kBits)], static_cast<unsigned>(shift));
  }
};

// The 8-bit code in the lowest byte of each lane, as float32, by way of 2^23, as in kernels_avx2.cpp.
SPARSE_MARLIN_AVX512_INLINE __m512 float_of_8(__m512i words) {
  constexpr float kOnes = 0x1p23f;
  constexpr int kAndThenOr = 0xea;
  const __m512i stored = _mm512_ternarylogic_epi32(words, _mm512_set1_epi32(0xff),
                                                   _mm512_set1_epi32(std::bit_cast<int>(kOnes)), kAndThenOr);
  return _mm512_sub_ps(_mm512_castsi512_ps(stored), _mm512_set1_ps(kOnes + static_cast<float>(encode(0, 8))));
}

// multiply.operator()<count>(acts, sums) for blocks of so many tokens, the largest first; the last count is 1.
template <int... kTokens, typename Act, typename Multiply>
void for_blocks(const Act* acts, int64_t tokens, float* sums, const Multiply& multiply) {
  const auto blocks = [&]<int kCount>() {
    for (; tokens >= kCount; tokens -= kCount, acts += kCount * kSliceCols, sums += kCount * kSliceRows) {
      multiply.template operator()<kCount>(acts, sums);
    }
  };
  (blocks.template operator()<kTokens>(), ...);
}

}  // namespace sparse_marlin::cpu
#endif
