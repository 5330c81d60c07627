// Both directions on CUDA: a thread a 32-bit word that is written, which collects the quads it holds from the other format. What
// it reads is scattered, but inside a tile, so the caches see to it; importing a checkpoint waits for the disk, not for this.
#include <cuda_runtime.h>

#include <algorithm>

#include "legacy/convert.h"
#include "legacy/marlin_24.h"
#include "pack/fault_slot.cuh"
#include "pack/pack_core.h"

namespace sparse_marlin {
namespace {

using namespace format;
using legacy::KeptQuad;

constexpr int kBlockThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // the loops of the kernels do the rest
using legacy::kNibble;

// Quad `quad` of row `n` in marlin-24, with the positions kept that packed_24 keeps; the quad that padding holds beyond k.
template <int kBits>
__device__ KeptQuad read_old(const ImportParams& p, int64_t n, int64_t quad, uint64_t* slot) {
  constexpr pack::StoredQuad kEmpty = pack::empty_quad(kBits);
  if (quad >= p.k / kQuad) return {kEmpty.first, kEmpty.second, kEmpty.nibble};
  const int64_t step = quad / kStepQuads, run = n / legacy::kRunRows;
  const int row = static_cast<int>(n % legacy::kRunRows), in_step = static_cast<int>(quad % kStepQuads);
  const Location first = legacy::code_location(row, in_step * kKeptPerQuad, kBits);
  const Location second = legacy::code_location(row, in_step * kKeptPerQuad + 1, kBits);
  const uint32_t codes =
      __ldg(p.codes + step * legacy::row_words(p.n, kBits) + run * legacy::run_words(kBits) + first.word);
  const uint32_t meta = __ldg(p.meta + step * legacy::row_meta(p.n) + run * legacy::row_meta(legacy::kRunRows) +
                              legacy::meta_place(row, in_step / legacy::kBlockQuads));
  constexpr uint32_t kCode = (1u << kBits) - 1;
  KeptQuad kept{codes >> first.shift & kCode, codes >> second.shift & kCode,
                meta >> (in_step % legacy::kBlockQuads * kMetaBits) & kNibble};
  if (legacy::rekeep<legacy::Convention::kNew>(kept, kBits)) {
    pack::report(pack::encode_fault(PackFault::kMetadata, n, quad * kQuad, p.k), slot);
  }
  return kept;
}

// Quad `quad` of row `n` in packed_24, with the positions kept that the old packers keep.
template <int kBits>
__device__ KeptQuad read_new(const ExportParams& p, int64_t n, int64_t quad, uint64_t* slot) {
  const int64_t col = quad * kQuad;
  const uint32_t* slice = p.packed + n / kTileRows * p.packed_row_words + slice_offset_words(n, col, kBits);
  const int row = static_cast<int>(n % kSliceRows), in_slice = static_cast<int>(quad % kSliceQuads);
  const Location first = code_location(row, in_slice * kKeptPerQuad, kBits);
  const Location second = code_location(row, in_slice * kKeptPerQuad + 1, kBits);
  const Location meta = meta_location(row, in_slice, kBits);
  const uint32_t codes = __ldg(slice + first.word);
  constexpr uint32_t kCode = (1u << kBits) - 1;
  KeptQuad kept{codes >> first.shift & kCode, codes >> second.shift & kCode,
                __ldg(slice + meta.word) >> meta.shift & kNibble};
  if (legacy::rekeep<legacy::Convention::kOld>(kept, kBits)) {
    pack::report(pack::encode_fault(PackFault::kMetadata, n, col, p.k), slot);
  }
  return kept;
}

template <int kBits>
__global__ void __launch_bounds__(kBlockThreads) import_kernel(ImportParams p, uint64_t* slot) {
  const int64_t row_words = packed_row_words(p.k, kBits), total = row_tiles(p.n) * row_words;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlockThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x; i < total; i += stride) {
    const int64_t in_row = i % row_words, col_tile = in_row / tile_words(kBits);
    const int in_tile = static_cast<int>(in_row % tile_words(kBits)), at = in_tile % slice_words(kBits);
    const int64_t row0 = i / row_words * kTileRows + in_tile / slice_words(kBits) * kSliceRows;
    const int64_t quad0 = col_tile * kSliceQuads;
    uint32_t word = 0;
    if (at < slice_code_words(kBits)) {
      for (int shift = 0; shift < kWordBits; shift += kBits) {
        const KeptCoord coord = code_coord(at, shift, kBits);
        if (coord.kept % kKeptPerQuad != 0) continue;  // goes with the first of its quad
        const KeptQuad quad = read_old<kBits>(p, row0 + coord.row, quad0 + coord.kept / kKeptPerQuad, slot);
        word |= quad.first << shift | quad.second << code_location(coord.row, coord.kept + 1, kBits).shift;
      }
    } else {
      for (int shift = 0; shift < kWordBits; shift += kMetaBits) {
        const QuadCoord coord = meta_coord(at, shift, kBits);
        word |= read_old<kBits>(p, row0 + coord.row, quad0 + coord.quad, slot).nibble << shift;
      }
    }
    p.packed[i] = word;
  }
}

// The words of the codes first, then those of the metadata, two values each.
template <int kBits>
__global__ void __launch_bounds__(kBlockThreads) export_kernel(ExportParams p, uint64_t* slot) {
  constexpr int kMetaPerWord = kWordBits / legacy::kMetaValueBits;
  constexpr int kRunMetaWords = static_cast<int>(legacy::row_meta(legacy::kRunRows)) / kMetaPerWord;
  const int64_t steps = p.k / kStepCols, code_row = legacy::row_words(p.n, kBits);
  const int64_t meta_row = p.n / legacy::kRunRows * kRunMetaWords;
  const int64_t code_total = steps * code_row, total = code_total + steps * meta_row;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlockThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x; i < total; i += stride) {
    uint32_t word = 0;
    if (i < code_total) {
      const int64_t quad0 = i / code_row * kStepQuads;
      const int64_t row0 = i % code_row / legacy::run_words(kBits) * legacy::kRunRows;
      const int at = static_cast<int>(i % code_row % legacy::run_words(kBits));
      for (int shift = 0; shift < kWordBits; shift += kBits) {
        const KeptCoord coord = legacy::code_coord(at, shift, kBits);
        if (coord.kept % kKeptPerQuad != 0) continue;
        const KeptQuad quad = read_new<kBits>(p, row0 + coord.row, quad0 + coord.kept / kKeptPerQuad, slot);
        word |= quad.first << shift | quad.second << legacy::code_location(coord.row, coord.kept + 1, kBits).shift;
      }
      p.codes[i] = word;
    } else {
      const int64_t m = i - code_total, quad0 = m / meta_row * kStepQuads;
      const int64_t row0 = m % meta_row / kRunMetaWords * legacy::kRunRows;
      for (int v = 0; v < kMetaPerWord; ++v) {
        const int place = static_cast<int>(m % meta_row % kRunMetaWords) * kMetaPerWord + v;
        const legacy::BlockCoord coord = legacy::meta_coord(place);
        for (int q = 0; q < legacy::kBlockQuads; ++q) {
          const KeptQuad quad =
              read_new<kBits>(p, row0 + coord.row, quad0 + coord.block * legacy::kBlockQuads + q, slot);
          word |= quad.nibble << (v * legacy::kMetaValueBits + q * kMetaBits);
        }
      }
      reinterpret_cast<uint32_t*>(p.meta)[m] = word;
    }
  }
}

unsigned blocks_for(int64_t words) {
  return static_cast<unsigned>(std::min((words + kBlockThreads - 1) / kBlockThreads, kMaxBlocks));
}

}  // namespace

PackStatus import_marlin_24_cuda(const ImportParams& p, void* stream_handle, std::string* error) {
  pack::CudaCalls calls(error);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  uint64_t* slot = pack::FaultSlot::cleared(calls);
  if (slot == nullptr) return {};
  const unsigned blocks = blocks_for(row_tiles(p.n) * packed_row_words(p.k, p.num_bits));
  if (p.num_bits == 4) {
    import_kernel<4><<<blocks, kBlockThreads, 0, stream>>>(p, slot);
  } else {
    import_kernel<8><<<blocks, kBlockThreads, 0, stream>>>(p, slot);
  }
  return pack::decode_fault(pack::wait_for(slot, stream, calls), p.n, p.k);
}

PackStatus export_marlin_24_cuda(const ExportParams& p, void* stream_handle, std::string* error) {
  pack::CudaCalls calls(error);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  uint64_t* slot = pack::FaultSlot::cleared(calls);
  if (slot == nullptr) return {};
  const int64_t steps = p.k / kStepCols;
  const unsigned blocks = blocks_for(steps * (legacy::row_words(p.n, p.num_bits) + legacy::row_meta(p.n)));
  if (p.num_bits == 4) {
    export_kernel<4><<<blocks, kBlockThreads, 0, stream>>>(p, slot);
  } else {
    export_kernel<8><<<blocks, kBlockThreads, 0, stream>>>(p, slot);
  }
  return pack::decode_fault(pack::wait_for(slot, stream, calls), p.n, p.k);
}

}  // namespace sparse_marlin
