// Packing and unpacking on the CPU, a slice at a time, and the text of the faults.
#include "pack/pack_24.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "cpu/half.h"
#include "pack/pack_core.h"

namespace sparse_marlin {
namespace {

using namespace format;
using pack::kNoFault;

constexpr int kMaxSliceWords = slice_words(8);

// Where the two codes and the nibble of a quad lie: the bijections of the format, evaluated once by the compiler.
struct QuadPlace {
  uint16_t code_word;  // both codes of a quad are in one word
  uint16_t meta_word;
  uint8_t first_shift;
  uint8_t second_shift;
  uint8_t meta_shift;
};
using QuadPlaces = std::array<std::array<QuadPlace, kSliceQuads>, kSliceRows>;

template <int kBits>
constexpr QuadPlaces make_places() {
  QuadPlaces places{};
  for (int row = 0; row < kSliceRows; ++row) {
    for (int quad = 0; quad < kSliceQuads; ++quad) {
      const Location first = code_location(row, quad * kKeptPerQuad, kBits);
      const Location second = code_location(row, quad * kKeptPerQuad + 1, kBits);
      const Location meta = meta_location(row, quad, kBits);
      if (first.word != second.word) throw "both codes of a quad must share a word";
      places[row][quad] = {static_cast<uint16_t>(first.word), static_cast<uint16_t>(meta.word),
                           static_cast<uint8_t>(first.shift), static_cast<uint8_t>(second.shift),
                           static_cast<uint8_t>(meta.shift)};
    }
  }
  return places;
}
template <int kBits>
constexpr QuadPlaces kPlaces = make_places<kBits>();
const QuadPlaces& places_of(int num_bits) { return num_bits == 4 ? kPlaces<4> : kPlaces<8>; }

template <int kBits>
constexpr std::array<uint32_t, slice_words(kBits)> make_empty_slice() {
  std::array<uint32_t, slice_words(kBits)> words{};
  const pack::StoredQuad empty = pack::empty_quad(kBits);
  for (const auto& row : make_places<kBits>()) {
    for (const QuadPlace& place : row) {
      words[place.code_word] |= empty.first << place.first_shift | empty.second << place.second_shift;
      words[place.meta_word] |= empty.nibble << place.meta_shift;
    }
  }
  return words;
}
template <int kBits>
constexpr std::array<uint32_t, slice_words(kBits)> kEmptySlice = make_empty_slice<kBits>();

// The type in which quads are judged, and how a step of a row is brought into it: codes as they are, floats in float32.
struct Codes {
  using Value = int;
  static void widen(const void* weight, int64_t index, int count, int* to) {
    for (int i = 0; i < count; ++i) to[i] = static_cast<const int8_t*>(weight)[index + i];
  }
};
template <DType kType>
struct Floats {
  using Value = float;
  static void widen(const void* weight, int64_t index, int count, float* to) {
    if (count == kStepCols) {  // a constant length, which compilers turn into vector code
      for (int i = 0; i < kStepCols; ++i) to[i] = load_float(weight, kType, index + i);
    } else {
      for (int i = 0; i < count; ++i) to[i] = load_float(weight, kType, index + i);
    }
  }
};

// Packs the slice whose first value is (row0, col0). Returns its first fault.
template <class Weight, int kBits>
uint64_t pack_slice(const PackParams& p, int64_t row0, int64_t col0, uint32_t* words) {
  std::copy(kEmptySlice<kBits>.begin(), kEmptySlice<kBits>.end(), words);
  constexpr pack::StoredQuad kPadding = pack::empty_quad(kBits);
  const int rows = static_cast<int>(std::clamp<int64_t>(p.n - row0, 0, kSliceRows));
  const int cols = static_cast<int>(std::clamp<int64_t>(p.k - col0, 0, kSliceCols));
  uint64_t fault = kNoFault;
  for (int r = 0; r < rows; ++r) {
    const int64_t row = row0 + r;
    for (int first_col = 0; first_col < cols; first_col += kStepCols) {
      const int count = std::min(cols - first_col, kStepCols);
      typename Weight::Value values[kStepCols];
      Weight::widen(p.weight, row * p.k + col0 + first_col, count, values);
      float scale = 1;
      if (p.weight_type != WeightType::kCodes) {  // no group ends inside a step
        scale = load_float(p.scales, p.scales_type, pack::group_of(col0 + first_col, p.group_size) * p.n + row);
      }
      for (int i = 0; i < count; i += kQuad) {
        const int col = first_col + i;
        const pack::StoredQuad stored = pack::store_quad(values + i, scale, kBits, row, col0 + col, p.k);
        fault = pack::min_fault(fault, stored.fault);
        const QuadPlace& place = kPlaces<kBits>[r][col / kQuad];
        const uint32_t first = (stored.first ^ kPadding.first) << place.first_shift;
        const uint32_t second = (stored.second ^ kPadding.second) << place.second_shift;
        words[place.code_word] ^= first | second;
        words[place.meta_word] ^= (stored.nibble ^ kPadding.nibble) << place.meta_shift;
      }
    }
  }
  return fault;
}

template <class Weight>
uint64_t pack_slice(const PackParams& p, int64_t row0, int64_t col0, uint32_t* words) {
  return p.num_bits == 4 ? pack_slice<Weight, 4>(p, row0, col0, words) : pack_slice<Weight, 8>(p, row0, col0, words);
}

uint64_t pack_slice(const PackParams& p, int64_t row0, int64_t col0, uint32_t* words) {
  switch (p.weight_type) {
    case WeightType::kCodes: return pack_slice<Codes>(p, row0, col0, words);
    case WeightType::kFloat32: return pack_slice<Floats<DType::kFloat32>>(p, row0, col0, words);
    case WeightType::kFloat16: return pack_slice<Floats<DType::kFloat16>>(p, row0, col0, words);
    default: return pack_slice<Floats<DType::kBFloat16>>(p, row0, col0, words);
  }
}

uint64_t unpack_slice(const UnpackParams& p, int64_t row0, int64_t col0, const uint32_t* words) {
  const QuadPlaces& places = places_of(p.num_bits);
  const uint32_t code_mask = (1u << p.num_bits) - 1;
  const int64_t padded_k = col_tiles(p.k) * kTileCols;
  uint64_t fault = kNoFault;
  for (int r = 0; r < kSliceRows; ++r) {
    const int64_t row = row0 + r;
    for (int q = 0; q < kSliceQuads; ++q) {
      const int64_t col = col0 + q * kQuad;
      const QuadPlace& place = places[r][q];
      const uint32_t nibble = words[place.meta_word] >> place.meta_shift & ((1u << kMetaBits) - 1);
      // Padding is judged too: the kernels read it.
      if (!valid_meta(nibble)) {
        fault = pack::min_fault(fault, pack::encode_fault(PackFault::kMetadata, row, col, padded_k));
        continue;
      }
      if (row >= p.n || col >= p.k) continue;
      const Pattern kept = meta_pattern(nibble);
      const uint32_t word = words[place.code_word];
      int8_t quad[kQuad] = {};
      quad[kept.first] = static_cast<int8_t>(decode(word >> place.first_shift & code_mask, p.num_bits));
      quad[kept.second] = static_cast<int8_t>(decode(word >> place.second_shift & code_mask, p.num_bits));
      std::memcpy(p.codes + row * p.k + col, quad, sizeof(quad));
    }
  }
  return fault;
}

// Runs body(slice row, column tile) -> fault over every slice and returns the smallest fault.
template <class Body>
uint64_t over_slices(int64_t n, int64_t k, const ParallelFor& parallel_for, const Body& body) {
  const int64_t cols = col_tiles(k), slices = row_tiles(n) * kTileSlices * cols;
  constexpr int64_t kGrain = 16;
  std::atomic<uint64_t> first{kNoFault};
  parallel_for(slices, kGrain, [&](int64_t begin, int64_t end) {
    uint64_t fault = kNoFault;
    for (int64_t i = begin; i < end; ++i) fault = pack::min_fault(fault, body(i / cols, i % cols));
    uint64_t seen = first.load();
    while (fault < seen && !first.compare_exchange_weak(seen, fault)) {
    }
  });
  return first.load();
}

uint64_t check_scales(const PackParams& p) {
  const int64_t groups = num_groups(p.k, p.group_size);
  for (int64_t i = 0; i < groups * p.n; ++i) {
    if (!pack::valid_scale(load_float(p.scales, p.scales_type, i))) {
      return pack::encode_fault(PackFault::kScale, i / p.n, i % p.n, p.n);
    }
  }
  return kNoFault;
}

}  // namespace

PackStatus pack_cpu(const PackParams& p, const ParallelFor& parallel_for) {
  const uint64_t scale_fault = check_scales(p);
  if (scale_fault != kNoFault) return pack::decode_fault(scale_fault, p.n, p.k);
  const int64_t row_words = packed_row_words(p.k, p.num_bits);
  const uint64_t fault = over_slices(p.n, p.k, parallel_for, [&](int64_t slice_row, int64_t col_tile) {
    const int64_t row = slice_row * kSliceRows, col = col_tile * kTileCols;
    uint32_t words[kMaxSliceWords];
    const uint64_t found = pack_slice(p, row, col, words);
    std::copy_n(words, slice_words(p.num_bits),
                p.packed + row / kTileRows * row_words + slice_offset_words(row, col, p.num_bits));
    return found;
  });
  return pack::decode_fault(fault, p.n, p.k);
}

PackStatus unpack_cpu(const UnpackParams& p, const ParallelFor& parallel_for) {
  const uint64_t fault = over_slices(p.n, p.k, parallel_for, [&](int64_t slice_row, int64_t col_tile) {
    const int64_t row = slice_row * kSliceRows, col = col_tile * kTileCols;
    return unpack_slice(p, row, col,
                        p.packed + row / kTileRows * p.packed_row_words + slice_offset_words(row, col, p.num_bits));
  });
  return pack::decode_fault(fault, p.n, col_tiles(p.k) * kTileCols);
}

std::string describe(const PackStatus& status, int num_bits) {
  const std::string row = std::to_string(status.row), col = std::to_string(status.col);
  const std::string at = "at row " + row + ", column " + col;
  const std::string range = std::to_string(code_min(num_bits)) + ".." + std::to_string(code_max(num_bits));
  switch (status.fault) {
    case PackFault::kNone: return "nothing is wrong";
    case PackFault::kScale:
      return "expected finite scales > 0, got another value at group " + row + ", output feature " + col;
    case PackFault::kNotSparse:
      return "expected 2:4 sparsity (at most two non-zero values in every four consecutive columns), got more in the "
             "four that start " +
             at + "; prune the weight first";
    case PackFault::kCodeRange:
      return "expected codes in " + range + " for num_bits=" + std::to_string(num_bits) +
             " (a float weight is divided by its scale and rounded), got another value " + at;
    case PackFault::kNotFinite: return "expected finite values, got NaN or infinity " + at;
    case PackFault::kMetadata:
      return "expected two rising 2:4 indices for every four columns, got corrupted metadata for the four that start " +
             at;
  }
  return "unknown fault";
}

}  // namespace sparse_marlin
