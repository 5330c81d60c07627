// The kernels with AVX-512 and its instruction for bfloat16: two activations of a row times its two kept codes, added to
// float32, for 16 rows at once. A row's two are picked from the four of a quad by a byte shuffle, so that a quad costs a
// token three instructions. Codes are exact in bfloat16; scales are multiplied in float32. The instruction takes
// subnormal numbers for zero (Intel 64 and IA-32 Architectures Software Developer's Manual, "VDPBF16PS"). One token
// alone, which waits for memory, and other activations take the kernels of AVX-512.
#include "cpu/rows_avx512.h"

#if defined(SPARSE_MARLIN_X86)

#define SPARSE_MARLIN_BF16 __attribute__((target("avx512f,avx512bw,avx512bf16")))
#define SPARSE_MARLIN_BF16_INLINE __attribute__((target("avx512f,avx512bw,avx512bf16"), always_inline)) inline

namespace sparse_marlin::cpu {
namespace {

constexpr __mmask32 kAll16 = 0xffffffff;
constexpr __mmask64 kAll8 = ~__mmask64{0};

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
SPARSE_MARLIN_BF16_INLINE __m512i pairs_of_8(__m512i words) {
  const __m512i first = _mm512_castps_si512(float_of_8(words));
  const __m512i second = _mm512_castps_si512(float_of_8(_mm512_maskz_srli_epi32(kAll, words, 8)));
  // of the second the upper half stays, of the first it becomes the lower one
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_maskz_srli_epi32(kAll, first, 16), second);
}

template <int kBits>
SPARSE_MARLIN_BF16 void decode_bits(const uint32_t* slice, DecodedPairs& out) {
  SliceRows<kBits> rows;
  rows.load(slice);
  const __m512i bytes = _mm512_load_si512(kActivationBytes.data());
#pragma GCC unroll 32
  for (int quad = 0; quad < kSliceQuads; ++quad) {
    const __m512i words = rows.code_words(quad, 0);
    _mm512_store_si512(out.weights[quad], kBits == 4 ? pairs_of_4(words) : pairs_of_8(words));
    // the permutation reads four bits
    _mm512_store_si512(out.bytes[quad], _mm512_maskz_permutexvar_epi32(kAll, rows.meta_words(quad, 0), bytes));
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

void multiply_pairs(const DecodedPairs& slice, StepScales scales, const uint16_t* acts, int64_t tokens, float* sums) {
  for_blocks<16, 8, 4, 2, 1>(acts, tokens, sums, [&]<int kTokens>(const uint16_t* block, float* block_sums) {
    multiply_tokens<kTokens>(slice, scales, block, block_sums);
  });
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
