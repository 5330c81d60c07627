// Packing on CUDA: a block a tile, a warp a slice, all in registers (lane_24.cuh says which lane does what).
//
// The packer finds codes in two ways. The quick one takes the four codes of a quad at once and either vouches for all quads of
// its lane or calls them unusual; then the careful one, store_quad of the CPU packer, finds codes and faults anew. What limits the
// kernels is the number of instructions (docs/PACKING.md), so that is what the quick way saves.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <bit>

#include "pack/fault_slot.cuh"
#include "pack/lane_24.cuh"
#include "pack/pack_24.h"
#include "pack/pack_core.h"

namespace sparse_marlin {
namespace {

using namespace format;
using namespace pack;

// --- what is read ---------------------------------------------------------------------------------------------------------
// How a quad lies in memory, and its values in the type they are judged in.
template <WeightType kType>
struct Element {  // float16, bfloat16
  using Quad = uint2;
  using Value = float;
  static __device__ float value(const Quad& quad, int i) {
    const uint32_t pair = i / 2 == 0 ? quad.x : quad.y;
    if (kType == WeightType::kBFloat16) return __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    return __half2float(__ushort_as_half(static_cast<uint16_t>(i % 2 == 0 ? pair : pair >> 16)));
  }
};
template <>
struct Element<WeightType::kFloat32> {
  using Quad = float4;
  using Value = float;
  static __device__ float value(const Quad& quad, int i) {
    return i == 0 ? quad.x : i == 1 ? quad.y : i == 2 ? quad.z : quad.w;
  }
};
template <>
struct Element<WeightType::kCodes> {
  using Quad = uint32_t;
  using Value = int;
  static __device__ int value(const Quad& quad, int i) { return static_cast<int8_t>(quad >> (8 * i)); }
};

// A quad outside the weight is four zeros, which pack to what padding holds. Whole slices have a way of their own: the compiler
// puts what depends on a condition between conditional loads, and then they wait for one another.
template <bool kWhole, class Quad>
__device__ void load_quads(LaneQuads<Quad>& quads, const PackParams& p, const LanePlace& place) {
  const Quad* first = static_cast<const Quad*>(p.weight) + (place.row * p.k + place.col) / kQuad;
  each_quad([&](int i, int s, int h) {
    const Quad* from = first + (rows_to(i) * p.k + cols_to(s, h)) / kQuad;
    quads.at[i][s][h] = kWhole || place.inside(i, s, h) ? __ldg(from) : Quad{};
  });
}

__device__ float to_float(float scale) { return scale; }
__device__ float to_float(__half scale) { return __half2float(scale); }
__device__ float to_float(__nv_bfloat16 scale) { return __bfloat162float(scale); }

// Calls body with the pointer to the scales in their type.
template <class Body>
__device__ void with_scales(const PackParams& p, const Body& body) {
  switch (p.scales_type) {
    case DType::kFloat32: return body(static_cast<const float*>(p.scales));
    case DType::kFloat16: return body(static_cast<const __half*>(p.scales));
    case DType::kBFloat16: return body(static_cast<const __nv_bfloat16*>(p.scales));
  }
}

// No group ends inside a step, so a lane needs one scale a row and step. 1 outside the weight.
struct LaneScales {
  float at[kRowHalves][kSliceSteps];
};
template <bool kWhole, class Scale>
__device__ void load_scales(LaneScales& to, const Scale* scales, int64_t n, const LanePlace& place, int group_shift) {
#pragma unroll
  for (int s = 0; s < kSliceSteps; ++s) {
    const Scale* first = scales + ((place.col + cols_to(s, 0)) >> group_shift) * n + place.row;
#pragma unroll
    for (int i = 0; i < kRowHalves; ++i) {
      to.at[i][s] = kWhole || place.inside(i, s, 0) ? to_float(first[rows_to(i)]) : 1.0f;
    }
  }
}

// Every scale once, shared out over all threads of the grid.
__device__ void check_scales(const PackParams& p, int64_t count, uint64_t* slot) {
  with_scales(p, [&](const auto* scales) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
      if (!valid_scale(to_float(scales[i]))) {
        return report(encode_fault(PackFault::kScale, i / p.n, i % p.n, p.n), slot);
      }
    }
  });
}

// --- codes ----------------------------------------------------------------------------------------------------------------
// The codes of a quad as the format stores them (biased), a byte each, in the order of their columns.
using QuadCodes = uint32_t;
constexpr uint32_t kEachByte = 0x01010101u;
template <int kBits>
constexpr QuadCodes kZeroCodes = encode(0, kBits) * kEachByte;

// What the quick way is not sure of.
struct Doubts {
  uint32_t bits = 0;    // not 0: some
  float quotients = 0;  // the sum of their squares: below the limit, each is a number of less than 16 bits
  __device__ bool any() const { return bits != 0 || !(quotients < 0x1p28f); }
};

template <int kBits>
__device__ QuadCodes quick_codes(uint32_t quad, Doubts& doubts) {
  constexpr uint32_t kCode = ((1u << kBits) - 1) * kEachByte;
  doubts.bits |= (quad ^ quad << 1) & ~kCode;  // in a code that fits, all bits from the sign upwards are the same
  return quad & kCode ^ kZeroCodes<kBits>;
}

// Divides by one scale, often: a Newton step from the reciprocal gives the correctly rounded quotient (Markstein) as long as
// nothing underflows, which scales in this range ensure for all quotients that do not round to 0.
struct Divisor {
  float scale;
  float reciprocal;
  __device__ Divisor(float s, Doubts& doubts) : scale(s) {
    reciprocal = __frcp_rn(s);
    doubts.bits |= !(s >= 0x1p-100f && s <= 0x1p100f);
  }
  __device__ float divide(float value) const {
    const float estimate = value * reciprocal;
    return fmaf(fmaf(-scale, estimate, value), reciprocal, estimate);
  }
};

template <WeightType kType, int kBits>
__device__ QuadCodes quick_codes(const typename Element<kType>::Quad& quad, const Divisor& divisor, Doubts& doubts) {
  // Adding 1.5 * 2^23 rounds to the nearest even integer, as in code_of, and leaves the biased code in the low bits.
  constexpr float kRound = 12582912.0f;
  constexpr uint32_t kRoundBits = 0x4b400000u, kCode = (1u << kBits) - 1;
  uint32_t code[kQuad];
  int nonzero = 0;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const float value = Element<kType>::value(quad, i), steps = divisor.divide(value);
    nonzero += value != 0.0f;
    doubts.quotients += steps * steps;
    code[i] = __float_as_uint(steps + (kRound - code_min(kBits))) - kRoundBits;
  }
  const uint32_t even = code[0] + (code[2] << 16), odd = code[1] + (code[3] << 16);
  doubts.bits |= (even | odd) & ~(kCode | kCode << 16) | (nonzero > kKeptPerQuad);
  return even + (odd << 8);
}

// By the function of the CPU packer. Returns the first fault.
template <WeightType kType, int kBits>
__device__ uint64_t careful_codes(LaneQuads<QuadCodes>& codes, const PackParams& p, const LanePlace& place,
                                  int group_shift) {
  using E = Element<kType>;
  QuadCodes all[kRowHalves * kSliceSteps * kStepHalves];  // indexed at run time, so not in registers
  uint64_t fault = kNoFault;
#pragma unroll 1
  for (int q = 0; q < kRowHalves * kSliceSteps * kStepHalves; ++q) {
    const int i = q / (kSliceSteps * kStepHalves), s = q / kStepHalves % kSliceSteps, h = q % kStepHalves;
    all[q] = kZeroCodes<kBits>;
    if (!place.inside(i, s, h)) continue;
    const int64_t row = place.row + rows_to(i), col = place.col + cols_to(s, h);
    const auto quad = static_cast<const typename E::Quad*>(p.weight)[(row * p.k + col) / kQuad];
    typename E::Value values[kQuad];
#pragma unroll
    for (int v = 0; v < kQuad; ++v) values[v] = E::value(quad, v);
    float scale = 1.0f;
    if (kType != WeightType::kCodes) {
      with_scales(p, [&](const auto* scales) { scale = to_float(scales[(col >> group_shift) * p.n + row]); });
    }
    const StoredQuad stored = store_quad(values, scale, kBits, row, col, p.k);
    const Pattern at = meta_pattern(stored.nibble);
    all[q] ^= (stored.first ^ encode(0, kBits)) << (8 * at.first);
    all[q] ^= (stored.second ^ encode(0, kBits)) << (8 * at.second);
    fault = min_fault(fault, stored.fault);
  }
  each_quad([&](int i, int s, int h) { codes.at[i][s][h] = all[(i * kSliceSteps + s) * kStepHalves + h]; });
  return fault;
}

// --- packing --------------------------------------------------------------------------------------------------------------
// Bit i: byte i is not zero.
__device__ unsigned nonzero_bytes(uint32_t bytes) {
  constexpr uint32_t kLow = 0x7f7f7f7fu, kTop = 0x80808080u;
  const uint32_t top = ((bytes & kLow) + kLow | bytes) & kTop;
  constexpr uint32_t kGather = 1u << 21 | 1u << 14 | 1u << 7 | 1u;  // brings the top bits of the bytes to bits 28 .. 31
  return top * kGather >> 28;
}

// How to store a quad whose non-zero codes are known: the selector of __byte_perm that brings the two kept bytes as far apart as the
// format wants them, then the nibble, then a byte that is not 0 where more than two are not zero.
constexpr int kPlanNibble = 16, kPlanDoubt = 24;
template <int kBits>
__device__ uint32_t quad_plan(unsigned nonzero) {
  constexpr int kSecond = LaneCodes<kBits>::kGap / 8 * 4;
  constexpr uint32_t kZeroBytes = 0x4444u & ~(0xfu | 0xfu << kSecond);
  const uint32_t nibble = canonical_nibble(nonzero);
  const Pattern kept = meta_pattern(nibble);
  return kept.first | kept.second << kSecond | kZeroBytes | nibble << kPlanNibble |
         static_cast<uint32_t>(!valid_meta(nibble)) << kPlanDoubt;
}

// Or over the four lanes of a row.
__device__ uint32_t or_of_row(uint32_t bits) {
  bits |= __shfl_xor_sync(kWholeWarp, bits, 1);
  return bits | __shfl_xor_sync(kWholeWarp, bits, 2);
}

template <WeightType kType, int kBits>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(PackParams p, int64_t num_scales, int group_shift, uint64_t* slot) {
  using Codes = LaneCodes<kBits>;
  const LanePlace place(p.n, p.k, kBits);
  LaneQuads<typename Element<kType>::Quad> quads;
  place.whole ? load_quads<true>(quads, p, place) : load_quads<false>(quads, p, place);
  LaneScales scales;
  if constexpr (kType != WeightType::kCodes) {
    with_scales(p, [&](const auto* from) {
      place.whole ? load_scales<true>(scales, from, p.n, place, group_shift)
                  : load_scales<false>(scales, from, p.n, place, group_shift);
    });
  }
  __shared__ uint32_t quad_plans[1 << kQuad];
  if (threadIdx.x < 1 << kQuad) quad_plans[threadIdx.x] = quad_plan<kBits>(threadIdx.x);
  check_scales(p, num_scales, slot);
  __syncthreads();

  Doubts doubts;
  LaneQuads<QuadCodes> codes;
#pragma unroll
  for (int i = 0; i < kRowHalves; ++i) {
#pragma unroll
    for (int s = 0; s < kSliceSteps; ++s) {
      if constexpr (kType == WeightType::kCodes) {
#pragma unroll
        for (int h = 0; h < kStepHalves; ++h) codes.at[i][s][h] = quick_codes<kBits>(quads.at[i][s][h], doubts);
      } else {
        const Divisor divisor(scales.at[i][s], doubts);
#pragma unroll
        for (int h = 0; h < kStepHalves; ++h) {
          codes.at[i][s][h] = quick_codes<kType, kBits>(quads.at[i][s][h], divisor, doubts);
        }
      }
    }
  }
  LaneQuads<uint32_t> plans;
  const auto make_plans = [&] {
    uint32_t any = 0;
    each_quad([&](int i, int s, int h) {
      plans.at[i][s][h] = quad_plans[nonzero_bytes(codes.at[i][s][h] ^ kZeroCodes<kBits>)];
      any |= plans.at[i][s][h];
    });
    return any >> kPlanDoubt;
  };
  doubts.bits |= make_plans();
  if (doubts.any()) {
    report(careful_codes<kType, kBits>(codes, p, place, group_shift), slot);
    make_plans();
  }

  uint32_t words[Codes::kWords] = {}, meta[kMetaLaneWords] = {};
  each_quad([&](int i, int s, int h) {
    const uint32_t kept = __byte_perm(codes.at[i][s][h], 0, plans.at[i][s][h]);
    words[Codes::first(i, s, h).word] += kept << Codes::first(i, s, h).shift;
  });
#pragma unroll
  for (int s = 0; s < kSliceSteps; ++s) {
#pragma unroll
    for (int h = 0; h < kStepHalves; ++h) {
      constexpr uint32_t kHighHalves = 0x7632;  // the nibbles of both rows, each in half a word
      const uint32_t nibbles = __byte_perm(plans.at[0][s][h], plans.at[1][s][h], kHighHalves);
      const uint32_t of_row = or_of_row(nibbles << meta_shift(place.c));
      if (place.c == meta_lane(s, h)) meta[meta_word(s)] = of_row;
    }
  }

  uint32_t* slice = p.packed + place.row_tile * packed_row_words(p.k, kBits) + place.slice_at;
#pragma unroll
  for (int v = 0; v < Codes::kPlanes; ++v) {
    const uint32_t* w = words + v * kLaneVectorWords;
    reinterpret_cast<uint4*>(slice)[v * kLanes + place.lane] = make_uint4(w[0], w[1], w[2], w[3]);
  }
  reinterpret_cast<uint2*>(slice + slice_code_words(kBits))[place.lane] = make_uint2(meta[0], meta[1]);
}

// --- launches ---------------------------------------------------------------------------------------------------------------
template <WeightType kType>
void launch_pack(const PackParams& p, unsigned blocks, uint64_t* slot, cudaStream_t stream) {
  const int64_t scales = num_groups(p.k, p.group_size) * p.n;
  int group_shift = std::numeric_limits<int64_t>::digits;  // one group a row: every column is in group 0
  if (p.group_size != kChannelwise) group_shift = std::countr_zero(static_cast<unsigned>(p.group_size));
  if (p.num_bits == 4) {
    pack_kernel<kType, 4><<<blocks, kThreads, 0, stream>>>(p, scales, group_shift, slot);
  } else {
    pack_kernel<kType, 8><<<blocks, kThreads, 0, stream>>>(p, scales, group_shift, slot);
  }
}

void launch_pack(const PackParams& p, unsigned blocks, uint64_t* slot, cudaStream_t stream) {
  switch (p.weight_type) {
    case WeightType::kCodes: return launch_pack<WeightType::kCodes>(p, blocks, slot, stream);
    case WeightType::kFloat32: return launch_pack<WeightType::kFloat32>(p, blocks, slot, stream);
    case WeightType::kFloat16: return launch_pack<WeightType::kFloat16>(p, blocks, slot, stream);
    case WeightType::kBFloat16: return launch_pack<WeightType::kBFloat16>(p, blocks, slot, stream);
  }
}

}  // namespace

PackStatus pack_cuda(const PackParams& p, void* stream_handle, std::string* error) {
  CudaCalls calls(error);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const unsigned blocks = tile_blocks(p.n, p.k, error);
  uint64_t* slot = blocks == 0 ? nullptr : FaultSlot::cleared(calls);
  if (slot == nullptr) return {};
  launch_pack(p, blocks, slot, stream);
  return decode_fault(wait_for(slot, stream, calls), p.n, p.k);
}

}  // namespace sparse_marlin
