// Packing and unpacking on CUDA: a block a slice. Threads read quads along a row (coalesced), turn them into stored
// pairs with the functions of pack_core.h, and meet in shared memory to assemble the slice's words by the format's
// inverse bijections.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "pack/pack_24.h"
#include "pack/pack_core.h"

namespace sparse_marlin {
namespace {

using namespace format;
using pack::kNoFault;

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kRowsAtOnce = kThreads / kSliceQuads;  // a warp reads one row of a slice
constexpr int kScaleThreads = 256;
constexpr int64_t kMaxScaleBlocks = 1024;
constexpr int kSliceKept = kSliceQuads * kKeptPerQuad;
static_assert(kSliceQuads == kWarp && kSliceRows % kRowsAtOnce == 0);

__device__ float half_bits_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ float bfloat16_bits_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

__device__ float load_scale(const void* scales, DType type, int64_t index) {
  if (type == DType::kFloat32) return static_cast<const float*>(scales)[index];
  const uint16_t bits = static_cast<const uint16_t*>(scales)[index];
  return type == DType::kFloat16 ? half_bits_to_float(bits) : bfloat16_bits_to_float(bits);
}

// How a weight is stored, and the type its quads are judged in.
template <WeightType kType>
struct Element {
  using Stored = uint16_t;
  using Value = float;
  static __device__ float value(uint16_t bits) {
    return kType == WeightType::kFloat16 ? half_bits_to_float(bits) : bfloat16_bits_to_float(bits);
  }
};
template <>
struct Element<WeightType::kFloat32> {
  using Stored = float;
  using Value = float;
  static __device__ float value(float stored) { return stored; }
};
template <>
struct Element<WeightType::kCodes> {
  using Stored = int8_t;
  using Value = int;
  static __device__ int value(int8_t stored) { return stored; }
};

template <class Stored>
struct alignas(kQuad * sizeof(Stored)) StoredQuadVector {
  Stored at[kQuad];
};

// One load a quad where the base is aligned to a quad (k is a multiple of four, so every row then is), four elsewhere.
template <class Stored>
__device__ StoredQuadVector<Stored> load_quad(const Stored* quad, bool aligned) {
  if (aligned) return *reinterpret_cast<const StoredQuadVector<Stored>*>(quad);
  StoredQuadVector<Stored> values;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) values.at[i] = quad[i];
  return values;
}

__device__ void report(uint64_t fault, uint64_t* slot) {
  static_assert(sizeof(unsigned long long) == sizeof(uint64_t));
  if (fault != kNoFault) atomicMin(reinterpret_cast<unsigned long long*>(slot), static_cast<unsigned long long>(fault));
}

__global__ void check_scales_kernel(const void* scales, DType type, int64_t count, int64_t n, uint64_t* slot) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    if (!pack::valid_scale(load_scale(scales, type, i))) {
      return report(pack::encode_fault(PackFault::kScale, i / n, i % n, n), slot);
    }
  }
}

template <WeightType kType, int kBits>
__global__ void __launch_bounds__(kThreads) pack_kernel(PackParams p, bool aligned, uint64_t* slot) {
  using E = Element<kType>;
  __shared__ uint8_t codes[kSliceRows][kSliceKept];
  __shared__ uint8_t nibbles[kSliceRows][kSliceQuads];
  const unsigned cols = static_cast<unsigned>(col_tiles(p.k));
  const int64_t row0 = static_cast<int64_t>(blockIdx.x / cols) * kSliceRows;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x % cols) * kSliceCols;
  const int quad = threadIdx.x % kSliceQuads;
  const int64_t col = col0 + quad * kQuad;
  const int64_t group =
      p.group_size == kChannelwise ? 0 : static_cast<unsigned>(col) / static_cast<unsigned>(p.group_size);

  // All loads first: a block has little else to hide their latency with.
  constexpr int kPerThread = kSliceRows / kRowsAtOnce;
  StoredQuadVector<typename E::Stored> loaded[kPerThread];
  float scales[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t row = row0 + i * kRowsAtOnce + threadIdx.x / kSliceQuads;
    if (row >= p.n || col >= p.k) continue;
    loaded[i] = load_quad(static_cast<const typename E::Stored*>(p.weight) + row * p.k + col, aligned);
    scales[i] = kType == WeightType::kCodes ? 1.0f : load_scale(p.scales, p.scales_type, group * p.n + row);
  }
  uint64_t fault = kNoFault;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int r = i * kRowsAtOnce + threadIdx.x / kSliceQuads;
    pack::StoredQuad stored = pack::empty_quad(kBits);
    if (row0 + r < p.n && col < p.k) {
      typename E::Value values[kQuad];
#pragma unroll
      for (int v = 0; v < kQuad; ++v) values[v] = E::value(loaded[i].at[v]);
      stored = pack::store_quad(values, scales[i], kBits, row0 + r, col, p.k);
    }
    fault = pack::min_fault(fault, stored.fault);
    codes[r][quad * kKeptPerQuad] = static_cast<uint8_t>(stored.first);
    codes[r][quad * kKeptPerQuad + 1] = static_cast<uint8_t>(stored.second);
    nibbles[r][quad] = static_cast<uint8_t>(stored.nibble);
  }
  report(fault, slot);
  __syncthreads();

  uint32_t* slice = p.packed + row0 / kTileRows * packed_row_words(p.k, kBits) + slice_offset_words(row0, col0, kBits);
  for (int word = threadIdx.x; word < slice_code_words(kBits); word += kThreads) {
    uint32_t bits = 0;
#pragma unroll
    for (int shift = 0; shift < kWordBits; shift += kBits) {
      const KeptCoord at = code_coord(word, shift, kBits);
      bits |= static_cast<uint32_t>(codes[at.row][at.kept]) << shift;
    }
    slice[word] = bits;
  }
  for (int word = slice_code_words(kBits) + threadIdx.x; word < slice_words(kBits); word += kThreads) {
    uint32_t bits = 0;
#pragma unroll
    for (int shift = 0; shift < kWordBits; shift += kMetaBits) {
      const QuadCoord at = meta_coord(word, shift, kBits);
      bits |= static_cast<uint32_t>(nibbles[at.row][at.quad]) << shift;
    }
    slice[word] = bits;
  }
}

template <int kBits>
__global__ void __launch_bounds__(kThreads) unpack_kernel(UnpackParams p, bool aligned, uint64_t* slot) {
  __shared__ uint32_t words[slice_words(kBits)];
  const unsigned cols = static_cast<unsigned>(col_tiles(p.k));
  const int64_t row0 = static_cast<int64_t>(blockIdx.x / cols) * kSliceRows;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x % cols) * kSliceCols;
  const uint32_t* slice = p.packed + row0 / kTileRows * p.packed_row_words + slice_offset_words(row0, col0, kBits);
  for (int word = threadIdx.x; word < slice_words(kBits); word += kThreads) words[word] = slice[word];
  __syncthreads();

  const int quad = threadIdx.x % kSliceQuads;
  const int64_t col = col0 + quad * kQuad, padded_k = col_tiles(p.k) * kTileCols;
  uint64_t fault = kNoFault;
  for (int r = threadIdx.x / kSliceQuads; r < kSliceRows; r += kRowsAtOnce) {
    const int64_t row = row0 + r;
    const Location meta = meta_location(r, quad, kBits);
    const uint32_t nibble = words[meta.word] >> meta.shift & ((1u << kMetaBits) - 1);
    // Padding is judged too: the kernels read it.
    if (!valid_meta(nibble)) {
      fault = pack::min_fault(fault, pack::encode_fault(PackFault::kMetadata, row, col, padded_k));
      continue;
    }
    if (row >= p.n || col >= p.k) continue;
    const Pattern kept = meta_pattern(nibble);
    const Location first = code_location(r, quad * kKeptPerQuad, kBits);
    const Location second = code_location(r, quad * kKeptPerQuad + 1, kBits);
    const int a = decode(words[first.word] >> first.shift & ((1u << kBits) - 1), kBits);
    const int b = decode(words[second.word] >> second.shift & ((1u << kBits) - 1), kBits);
    StoredQuadVector<int8_t> codes;
    for (int i = 0; i < kQuad; ++i) codes.at[i] = static_cast<int8_t>(i == kept.first ? a : i == kept.second ? b : 0);
    int8_t* out = p.codes + row * p.k + col;
    if (aligned) {
      *reinterpret_cast<StoredQuadVector<int8_t>*>(out) = codes;
    } else {
      for (int i = 0; i < kQuad; ++i) out[i] = codes.at[i];
    }
  }
  report(fault, slot);
}

// Collects the first CUDA error of a sequence of calls.
class CudaCalls {
 public:
  explicit CudaCalls(std::string* error) : error_(error) { error_->clear(); }
  // Whether everything so far went well; `what` names the call in the message.
  bool ok(cudaError_t result, const char* what) {
    if (result != cudaSuccess && error_->empty()) *error_ = std::string(what) + ": " + cudaGetErrorString(result);
    return error_->empty();
  }

 private:
  std::string* error_;
};

// Blocks of a grid with one a slice, or 0 with a message where a grid cannot hold them.
unsigned slice_blocks(int64_t n, int64_t k, std::string* error) {
  const int64_t slices = row_tiles(n) * kTileSlices * col_tiles(k);
  if (slices <= std::numeric_limits<int>::max()) return static_cast<unsigned>(slices);
  *error = "expected at most 2^31 - 1 slices of 16 x 128, got " + std::to_string(slices);
  return 0;
}

bool aligned_to(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <WeightType kType>
void launch_pack(const PackParams& p, unsigned blocks, uint64_t* slot, cudaStream_t stream) {
  const bool aligned = aligned_to(p.weight, sizeof(StoredQuadVector<typename Element<kType>::Stored>));
  if (p.num_bits == 4) {
    pack_kernel<kType, 4><<<blocks, kThreads, 0, stream>>>(p, aligned, slot);
  } else {
    pack_kernel<kType, 8><<<blocks, kThreads, 0, stream>>>(p, aligned, slot);
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

// Reads the slot once the stream has come to it.
uint64_t read_slot(const uint64_t* slot, cudaStream_t stream, CudaCalls& calls) {
  uint64_t fault = kNoFault;
  calls.ok(cudaMemcpyAsync(&fault, slot, sizeof(fault), cudaMemcpyDeviceToHost, stream), "reading the fault slot");
  calls.ok(cudaStreamSynchronize(stream), "waiting for the stream");
  return fault;
}

}  // namespace

PackStatus pack_cuda(const PackParams& p, uint64_t* fault_slot, void* stream_handle, std::string* error) {
  CudaCalls calls(error);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const unsigned blocks = slice_blocks(p.n, p.k, error);
  if (blocks == 0) return {};
  if (!calls.ok(cudaMemsetAsync(fault_slot, 0xff, sizeof(*fault_slot), stream), "clearing the fault slot")) return {};
  const int64_t scales = num_groups(p.k, p.group_size) * p.n;
  const int64_t scale_blocks = std::min((scales + kScaleThreads - 1) / kScaleThreads, kMaxScaleBlocks);
  check_scales_kernel<<<static_cast<unsigned>(scale_blocks), kScaleThreads, 0, stream>>>(p.scales, p.scales_type,
                                                                                         scales, p.n, fault_slot);
  if (!calls.ok(cudaGetLastError(), "launching the scale check")) return {};
  launch_pack(p, blocks, fault_slot, stream);
  if (!calls.ok(cudaGetLastError(), "launching the packer")) return {};
  return pack::decode_fault(read_slot(fault_slot, stream, calls), p.n, p.k);
}

PackStatus unpack_cuda(const UnpackParams& p, uint64_t* fault_slot, void* stream_handle, std::string* error) {
  CudaCalls calls(error);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const unsigned blocks = slice_blocks(p.n, p.k, error);
  if (blocks == 0) return {};
  if (!calls.ok(cudaMemsetAsync(fault_slot, 0xff, sizeof(*fault_slot), stream), "clearing the fault slot")) return {};
  const bool aligned = aligned_to(p.codes, sizeof(StoredQuadVector<int8_t>));
  if (p.num_bits == 4) {
    unpack_kernel<4><<<blocks, kThreads, 0, stream>>>(p, aligned, fault_slot);
  } else {
    unpack_kernel<8><<<blocks, kThreads, 0, stream>>>(p, aligned, fault_slot);
  }
  if (!calls.ok(cudaGetLastError(), "launching the unpacker")) return {};
  return pack::decode_fault(read_slot(fault_slot, stream, calls), p.n, col_tiles(p.k) * kTileCols);
}

}  // namespace sparse_marlin
