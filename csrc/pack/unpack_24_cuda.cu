// Unpacking on CUDA: a block a tile, a warp a slice, all in registers (lane_24.cuh says which lane does what).
#include <cuda_runtime.h>

#include "pack/fault_slot.cuh"
#include "pack/lane_24.cuh"
#include "pack/pack_24.h"
#include "pack/pack_core.h"

namespace sparse_marlin {
namespace {

using namespace format;
using namespace pack;

// Bit i says whether metadata nibble i is valid.
constexpr uint32_t valid_nibbles() {
  uint32_t all = 0;
  for (uint32_t i = 0; i < 1u << kMetaBits; ++i) all |= static_cast<uint32_t>(valid_meta(i)) << i;
  return all;
}
constexpr uint32_t kNibble = (1u << kMetaBits) - 1;

// A quad's four codes, a byte each, from bits that start with its two stored codes and bits that start with its nibble.
template <int kBits>
__device__ uint32_t unpack_quad(uint32_t stored, uint32_t nibble) {
  constexpr uint32_t kCode = (1u << kBits) - 1, kMinusBias = static_cast<uint32_t>(code_min(kBits)), kByte = 0xff;
  const uint32_t first = (stored & kCode) + kMinusBias & kByte;
  const uint32_t second = (stored >> LaneCodes<kBits>::kGap & kCode) + kMinusBias & kByte;
  const Pattern kept = meta_pattern(nibble);
  return first << (8 * kept.first) | second << (8 * kept.second);
}

// The lane's first quad whose metadata is not two rising indices.
template <int kBits>
__device__ uint64_t meta_fault(const UnpackParams& p, const LanePlace& place, const uint32_t* slice) {
  const int64_t padded_k = col_tiles(p.k) * kTileCols;
  uint64_t fault = kNoFault;
#pragma unroll 1
  for (int q = 0; q < kRowHalves * kSliceSteps * kStepHalves; ++q) {
    const int i = q / (kSliceSteps * kStepHalves), s = q / kStepHalves % kSliceSteps, h = q % kStepHalves;
    const Location at = meta_location(place.g + rows_to(i), place.c + cols_to(s, h) / kQuad, kBits);
    if (valid_meta(slice[at.word] >> at.shift & kNibble)) continue;
    const int64_t row = place.row + rows_to(i), col = place.col + cols_to(s, h);
    fault = min_fault(fault, encode_fault(PackFault::kMetadata, row, col, padded_k));
  }
  return fault;
}

// kWide: rows start at multiples of 8 bytes. Then neighbouring lanes swap quads, so that each writes two side by side and the four
// lanes of a row write 32 bytes at once: single quads took twice as long.
template <int kBits, bool kWide>
__global__ void __launch_bounds__(kThreads) unpack_kernel(UnpackParams p, uint64_t* slot) {
  using Codes = LaneCodes<kBits>;
  const LanePlace place(p.n, p.k, kBits);
  const uint32_t* slice = p.packed + place.row_tile * p.packed_row_words + place.slice_at;
  uint32_t words[Codes::kWords];
#pragma unroll
  for (int v = 0; v < Codes::kPlanes; ++v) {
    const uint4 vector = __ldg(reinterpret_cast<const uint4*>(slice) + v * kLanes + place.lane);
    uint32_t* w = words + v * kLaneVectorWords;
    w[0] = vector.x, w[1] = vector.y, w[2] = vector.z, w[3] = vector.w;
  }
  const uint2 meta = __ldg(reinterpret_cast<const uint2*>(slice + slice_code_words(kBits)) + place.lane);

  uint32_t valid = 1;
  LaneQuads<uint32_t> quads;
#pragma unroll
  for (int s = 0; s < kSliceSteps; ++s) {
#pragma unroll
    for (int h = 0; h < kStepHalves; ++h) {
      const uint32_t of_row =
          __shfl_sync(kWholeWarp, meta_word(s) == 0 ? meta.x : meta.y, place.g * kLanesPerRow + meta_lane(s, h));
#pragma unroll
      for (int i = 0; i < kRowHalves; ++i) {
        const uint32_t nibble = of_row >> (meta_shift(place.c) + i * kMetaHighRow);
        valid &= valid_nibbles() >> (nibble & kNibble);  // padding is judged too: the GEMM's kernels read it
        const Location first = Codes::first(i, s, h);
        quads.at[i][s][h] = unpack_quad<kBits>(words[first.word] >> first.shift, nibble);
      }
    }
  }
  if (!valid) report(meta_fault<kBits>(p, place, slice), slot);

  int8_t* out = p.codes + place.row * p.k + place.col;
  if constexpr (kWide) {
    // Even lanes take the lower quads of their own and of the odd lane, odd lanes the upper ones.
    const bool odd = place.c % 2 != 0;
    const int to = odd ? cols_to(0, 1) - kQuad : 0;
#pragma unroll
    for (int i = 0; i < kRowHalves; ++i) {
#pragma unroll
      for (int s = 0; s < kSliceSteps; ++s) {
        const uint32_t lower = quads.at[i][s][0], upper = quads.at[i][s][1];
        const uint32_t got = __shfl_xor_sync(kWholeWarp, odd ? lower : upper, 1);
        const int col = cols_to(s, 0) + to;
        if (rows_to(i) < place.rows_left && col < place.cols_left) {
          *reinterpret_cast<uint2*>(out + rows_to(i) * p.k + col) =
              odd ? make_uint2(got, upper) : make_uint2(lower, got);
        }
      }
    }
  } else {
    each_quad([&](int i, int s, int h) {
      if (!place.inside(i, s, h)) return;
      *reinterpret_cast<uint32_t*>(out + rows_to(i) * p.k + cols_to(s, h)) = quads.at[i][s][h];
    });
  }
}

template <int kBits>
void launch_unpack(const UnpackParams& p, unsigned blocks, uint64_t* slot, cudaStream_t stream) {
  if (p.k % (2 * kQuad) == 0) {
    unpack_kernel<kBits, true><<<blocks, kThreads, 0, stream>>>(p, slot);
  } else {
    unpack_kernel<kBits, false><<<blocks, kThreads, 0, stream>>>(p, slot);
  }
}

void launch_unpack(const UnpackParams& p, unsigned blocks, uint64_t* slot, cudaStream_t stream) {
  return p.num_bits == 4 ? launch_unpack<4>(p, blocks, slot, stream) : launch_unpack<8>(p, blocks, slot, stream);
}

}  // namespace

PackStatus unpack_cuda(const UnpackParams& p, void* stream_handle, std::string* error) {
  CudaCalls calls(error);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const unsigned blocks = tile_blocks(p.n, p.k, error);
  uint64_t* slot = blocks == 0 ? nullptr : FaultSlot::cleared(calls);
  if (slot == nullptr) return {};
  launch_unpack(p, blocks, slot, stream);
  return decode_fault(wait_for(slot, stream, calls), p.n, col_tiles(p.k) * kTileCols);
}

}  // namespace sparse_marlin
