// The kernels with AVX-512 and its instruction for bfloat16: two activations of a row times its two kept codes, added to
// float32, for 16 rows at once. A row's two are picked from the four of a quad by a byte shuffle, so that a quad costs a
// token three instructions. Codes are exact in bfloat16; scales are multiplied in float32. The instruction takes
// subnormal numbers for zero (Intel 64 and IA-32 Architectures Software Developer's Manual, "VDPBF16PS"). One token
// alone, which waits for memory, and other activations take the kernels of AVX-512.
#include "cpu/kernels.h"

#if defined(SPARSE_MARLIN_X86)
#include <immintrin.h>

#include <array>
#include <bit>

#define SPARSE_MARLIN_BF16 __attribute__((target("avx512f,avx512bw,avx512bf16")))
#define SPARSE_MARLIN_BF16_INLINE __attribute__((target("avx512f,avx512bw,avx512bf16"), always_inline)) inline

namespace sparse_marlin::cpu {
namespace {

using namespace format;

constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns about its own header for the forms without a mask
constexpr __mmask8 kAll64 = 0xff;
constexpr __mmask32 kAll16 = 0xffffffff;
constexpr __mmask64 kAll8 = ~__mmask64{0};

// Lanes of a vector of rows: the transposition below leaves them in this order. Its own inverse.
constexpr std::array<int, kSliceRows> kRowOfLane{0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15};
constexpr bool own_inverse() {
  for (int i = 0; i < kSliceRows; ++i) {
    if (kRowOfLane[kRowOfLane[i]] != i) return false;
  }
  return true;
}
static_assert(own_inverse());

constexpr int kRowCodeWords = kLanesPerRow * kLaneVectorWords;  // consecutive words of a row pair, a plane
constexpr int kRowMetaWords = kLanesPerRow * kMetaLaneWords;
constexpr int kPlaneWords = kLanes * kLaneVectorWords;

// What decode() relies on: the words of row g lie g * kRow*Words behind row 0's, rows g and g + 8 share them, and where
// the codes of a quad are in their word depends on which of the two rows it is alone.
template <int kBits>
constexpr int kSecondRow = kBits == 4 ? 4 : 16;  // bits from a code of row g to the one of row g + 8
constexpr int kMetaSecondRow = 16;
template <int kBits>
constexpr bool quads_share_words() {
  constexpr int kSecond = kBits == 4 ? 16 : 8, kRow = kSecondRow<kBits>;  // kSecond: from a first code to its second
  for (int row = 0; row < kSliceRows; ++row) {
    const int g = row % kHalfRows, half = row / kHalfRows;
    for (int quad = 0; quad < kSliceQuads; ++quad) {
      const Location at = code_location(0, quad * kKeptPerQuad, kBits);
      const Location first = code_location(row, quad * kKeptPerQuad, kBits);
      const Location second = code_location(row, quad * kKeptPerQuad + 1, kBits);
      if (first.word != at.word + g * kRowCodeWords || first.shift != at.shift + half * kRow) return false;
      if (second.word != first.word || second.shift != first.shift + kSecond) return false;
      const Location meta = meta_location(row, quad, kBits), meta0 = meta_location(0, quad, kBits);
      if (meta.word != meta0.word + g * kRowMetaWords || meta.shift != meta0.shift + half * kMetaSecondRow)
        return false;
    }
  }
  return true;
}
static_assert(quads_share_words<4>() && quads_share_words<8>());

// Words 4i + c, i < kVectors, of eight rows `row_words` apart, in the order of the lanes: out[4i + c]. A word is there
// for both of its rows, for the second one shifted by kSecondRow bits, so that both have what is theirs in one place.
template <int kVectors, int kSecondRow>
SPARSE_MARLIN_BF16_INLINE void transpose(const uint32_t* words, int row_words, __m512i* out) {
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

constexpr uint16_t bf16_bits(int value) {
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(value)) >> 16);
}
// bfloat16 of every stored 4-bit code, twice.
constexpr std::array<uint16_t, 32> stored_codes() {
  std::array<uint16_t, 32> table{};
  for (int i = 0; i < 32; ++i) table[i] = bf16_bits(i % 16 - static_cast<int>(encode(0, 4)));
  return table;
}
// Of every metadata nibble: the bytes of its two activations among the eight of a quad.
constexpr std::array<uint32_t, 16> activation_bytes() {
  std::array<uint32_t, 16> table{};
  for (uint32_t nibble = 0; nibble < 16; ++nibble) {
    const Pattern p = meta_pattern(nibble);
    const uint32_t first = 2 * static_cast<uint32_t>(p.first), second = 2 * static_cast<uint32_t>(p.second);
    table[nibble] = first | (first + 1) << 8 | second << 16 | (second + 1) << 24;
  }
  return table;
}
alignas(64) constexpr std::array<uint16_t, 32> kStoredCodes = stored_codes();
alignas(64) constexpr std::array<uint32_t, 16> kActivationBytes = activation_bytes();

// Both codes of 16 rows of a quad; words: those of the quad, shifted so that the first code is the lowest.
SPARSE_MARLIN_BF16_INLINE __m512i pairs_of_4(__m512i words) {
  const __m512i index = _mm512_maskz_and_epi32(kAll, words, _mm512_set1_epi32(0x000f000f));
  return _mm512_maskz_permutexvar_epi16(kAll16, index, _mm512_load_si512(kStoredCodes.data()));
}
// The code in the lowest byte as float32, by way of 2^23, as in kernels_avx2.cpp.
SPARSE_MARLIN_BF16_INLINE __m512i float_of_8(__m512i words) {
  constexpr float kOnes = 0x1p23f;
  constexpr int kAndThenOr = 0xea;
  const __m512i stored = _mm512_ternarylogic_epi32(words, _mm512_set1_epi32(0xff),
                                                   _mm512_set1_epi32(std::bit_cast<int>(kOnes)), kAndThenOr);
  return _mm512_castps_si512(
      _mm512_sub_ps(_mm512_castsi512_ps(stored), _mm512_set1_ps(kOnes + static_cast<float>(encode(0, 8)))));
}
SPARSE_MARLIN_BF16_INLINE __m512i pairs_of_8(__m512i words) {
  const __m512i first = float_of_8(words), second = float_of_8(_mm512_maskz_srli_epi32(kAll, words, 8));
  // of the second the upper half stays, of the first it becomes the lower one
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_maskz_srli_epi32(kAll, first, 16), second);
}

template <int kBits>
SPARSE_MARLIN_BF16 void decode_bits(const uint32_t* slice, DecodedPairs& out) {
  constexpr int kPlanes = slice_code_words(kBits) / kPlaneWords, kRow = kSecondRow<kBits>;
  __m512i codes[kPlanes * kRowCodeWords], meta[kRowMetaWords];
  for (int plane = 0; plane < kPlanes; ++plane)
    transpose<kRowCodeWords / 4, kRow>(slice + plane * kPlaneWords, kRowCodeWords, codes + plane * kRowCodeWords);
  transpose<kRowMetaWords / 4, kMetaSecondRow>(slice + slice_code_words(kBits), kRowMetaWords, meta);
  const __m512i bytes = _mm512_load_si512(kActivationBytes.data());
#pragma GCC unroll 32
  for (int quad = 0; quad < kSliceQuads; ++quad) {
    const Location at = code_location(0, quad * kKeptPerQuad, kBits), meta_at = meta_location(0, quad, kBits);
    const int word = at.word / kPlaneWords * kRowCodeWords + at.word % kPlaneWords;
    const __m512i words = _mm512_maskz_srli_epi32(kAll, codes[word], static_cast<unsigned>(at.shift));
    _mm512_store_si512(out.weights[quad], kBits == 4 ? pairs_of_4(words) : pairs_of_8(words));
    const __m512i nibbles = _mm512_maskz_srli_epi32(kAll, meta[meta_at.word - slice_code_words(kBits)],
                                                    static_cast<unsigned>(meta_at.shift));
    _mm512_store_si512(out.bytes[quad], _mm512_maskz_permutexvar_epi32(kAll, nibbles, bytes));  // reads four bits
  }
}
void decode_pairs(const uint32_t* slice, int num_bits, DecodedPairs& out) {
  num_bits == 4 ? decode_bits<4>(slice, out) : decode_bits<8>(slice, out);
}

// Steps first .. last - 1, which have one scale a row. Few tokens have too few sums to hide the latency of an addition,
// so that neighbouring quads are summed apart.
template <int kTokens>
SPARSE_MARLIN_BF16_INLINE void multiply_steps(const DecodedPairs& slice, int first, int last, const float* scales,
                                              const uint16_t* acts, float* sums) {
  constexpr int kChains = kTokens >= 8 ? 1 : 8 / kTokens;
  __m512 partial[kTokens * kChains];
#pragma GCC unroll 16
  for (__m512& p : partial) p = _mm512_setzero_ps();
  for (int quad = first * kStepQuads; quad < last * kStepQuads; quad += kChains) {
#pragma GCC unroll 8
    for (int chain = 0; chain < kChains; ++chain) {
      const auto weights = reinterpret_cast<__m512bh>(_mm512_load_si512(slice.weights[quad + chain]));
      const __m512i bytes = _mm512_load_si512(slice.bytes[quad + chain]);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const auto* from = reinterpret_cast<const __m128i*>(acts + t * kSliceCols + (quad + chain) * kQuad);
        const __m512i x = _mm512_maskz_broadcastq_epi64(kAll64, _mm_loadl_epi64(from));
        const auto mine = reinterpret_cast<__m512bh>(_mm512_maskz_shuffle_epi8(kAll8, x, bytes));
        __m512& p = partial[t * kChains + chain];
        p = _mm512_dpbf16_ps(p, weights, mine);
      }
    }
  }
  const __m512 scale = _mm512_loadu_ps(scales);
  const __m512i rows = _mm512_loadu_si512(kRowOfLane.data());
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
    __m512 total = partial[t * kChains];
#pragma GCC unroll 8
    for (int chain = 1; chain < kChains; ++chain) total = _mm512_add_ps(total, partial[t * kChains + chain]);
    float* sum = sums + t * kSliceRows;
    total = _mm512_maskz_permutexvar_ps(kAll, rows, total);
    _mm512_storeu_ps(sum, _mm512_fmadd_ps(total, scale, _mm512_loadu_ps(sum)));
  }
}

template <int kTokens>
SPARSE_MARLIN_BF16 void multiply_tokens(const DecodedPairs& slice, StepScales scales, const uint16_t* acts,
                                        float* sums) {
  for (int first = 0, last; first < kSliceSteps; first = last) {
    for (last = first + 1; last < kSliceSteps && scales[last] == scales[first]; ++last) {
    }
    multiply_steps<kTokens>(slice, first, last, scales[first], acts, sums);
  }
}

template <int kTokens>
void multiply_blocks(const DecodedPairs& slice, StepScales scales, const uint16_t*& acts, int64_t& tokens,
                     float*& sums) {
  for (; tokens >= kTokens; tokens -= kTokens, acts += kTokens * kSliceCols, sums += kTokens * kSliceRows) {
    multiply_tokens<kTokens>(slice, scales, acts, sums);
  }
}

void multiply_pairs(const DecodedPairs& slice, StepScales scales, const uint16_t* acts, int64_t tokens, float* sums) {
  multiply_blocks<16>(slice, scales, acts, tokens, sums);
  multiply_blocks<8>(slice, scales, acts, tokens, sums);
  multiply_blocks<4>(slice, scales, acts, tokens, sums);
  multiply_blocks<2>(slice, scales, acts, tokens, sums);
  multiply_blocks<1>(slice, scales, acts, tokens, sums);
}

}  // namespace

const Kernels& avx512_bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512_kernels();
    k.decode_pairs = decode_pairs;
    k.multiply_pairs = multiply_pairs;
    return k;
  }();
  return kernels;
}

}  // namespace sparse_marlin::cpu
#endif
