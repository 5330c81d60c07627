// Both directions on the CPU, a slice of packed_24 at a time. Where things lie in either format is a table made by the compiler
// from the two headers; what is left to do is to move the codes of a quad and its nibble.
#include "legacy/convert.h"

#include <algorithm>
#include <array>
#include <atomic>

#include "legacy/marlin_24.h"

namespace sparse_marlin {
namespace {

using namespace format;
using legacy::KeptQuad;
using pack::kNoFault;

struct Place {
  uint16_t code_word;
  uint8_t first;  // shifts of the two codes, which share a word, and of the nibble
  uint8_t second;
  uint16_t meta_word;
  uint8_t nibble;
};

// Inside a slice of packed_24.
using SlicePlaces = std::array<std::array<Place, kSliceQuads>, kSliceRows>;
template <int kBits>
constexpr SlicePlaces make_slice_places() {
  SlicePlaces places{};
  for (int row = 0; row < kSliceRows; ++row) {
    for (int quad = 0; quad < kSliceQuads; ++quad) {
      const Location first = code_location(row, quad * kKeptPerQuad, kBits);
      const Location second = code_location(row, quad * kKeptPerQuad + 1, kBits);
      const Location meta = meta_location(row, quad, kBits);
      places[row][quad] = {static_cast<uint16_t>(first.word), static_cast<uint8_t>(first.shift),
                           static_cast<uint8_t>(second.shift), static_cast<uint16_t>(meta.word),
                           static_cast<uint8_t>(meta.shift)};
    }
  }
  return places;
}
template <int kBits>
constexpr SlicePlaces kSlicePlaces = make_slice_places<kBits>();

template <int kBits>
constexpr std::array<uint32_t, slice_words(kBits)> make_empty_slice() {
  std::array<uint32_t, slice_words(kBits)> words{};
  const pack::StoredQuad empty = pack::empty_quad(kBits);
  for (const auto& row : make_slice_places<kBits>()) {
    for (const Place& place : row) {
      words[place.code_word] |= empty.first << place.first | empty.second << place.second;
      words[place.meta_word] |= empty.nibble << place.nibble;
    }
  }
  return words;
}
template <int kBits>
constexpr std::array<uint32_t, slice_words(kBits)> kEmptySlice = make_empty_slice<kBits>();

// Inside a run of marlin-24 codes and metadata.
using RunPlaces = std::array<std::array<Place, kStepQuads>, legacy::kRunRows>;
template <int kBits>
constexpr RunPlaces make_run_places() {
  RunPlaces places{};
  for (int row = 0; row < legacy::kRunRows; ++row) {
    for (int quad = 0; quad < kStepQuads; ++quad) {
      const Location first = legacy::code_location(row, quad * kKeptPerQuad, kBits);
      const Location second = legacy::code_location(row, quad * kKeptPerQuad + 1, kBits);
      const int block = quad / legacy::kBlockQuads;
      places[row][quad] = {static_cast<uint16_t>(first.word), static_cast<uint8_t>(first.shift),
                           static_cast<uint8_t>(second.shift), static_cast<uint16_t>(legacy::meta_place(row, block)),
                           static_cast<uint8_t>(quad % legacy::kBlockQuads * kMetaBits)};
    }
  }
  return places;
}
template <int kBits>
constexpr RunPlaces kRunPlaces = make_run_places<kBits>();

template <int kBits, class Word>
KeptQuad load(const Place& place, uint32_t codes, Word meta) {
  constexpr uint32_t kCode = (1u << kBits) - 1;
  return {codes >> place.first & kCode, codes >> place.second & kCode,
          static_cast<uint32_t>(meta) >> place.nibble & legacy::kNibble};
}
// What turns the two zero codes of an empty slice into these.
template <int kBits>
uint32_t code_bits(const Place& place, const KeptQuad& quad) {
  constexpr uint32_t kZero = encode(0, kBits);
  return (quad.first ^ kZero) << place.first | (quad.second ^ kZero) << place.second;
}

// A slice of the weight: its rows are in one run of marlin-24, its columns in up to four steps.
struct SliceOrigin {
  int64_t row;
  int64_t col;
  int steps;
  int run_row;      // of its first row
  int64_t code_at;  // first word of the run in a row of codes
  int64_t meta_at;  // first value of the run in a row of metadata
  SliceOrigin(int64_t slice_row, int64_t col_tile, int64_t k, int num_bits)
      : row(slice_row * kSliceRows),
        col(col_tile * kTileCols),
        steps(static_cast<int>(std::min<int64_t>((k - col) / kStepCols, kSliceSteps))),
        run_row(static_cast<int>(row % legacy::kRunRows)),
        code_at(row / legacy::kRunRows * legacy::run_words(num_bits)),
        meta_at(row / legacy::kRunRows * legacy::row_meta(legacy::kRunRows)) {}
};

// The first quad of a step with invalid metadata, sought once it is known that there is one. `nibble` gives that of (row, quad).
template <class Nibble>
uint64_t meta_fault(const SliceOrigin& at, int step, int64_t k, const Nibble& nibble) {
  for (int r = 0; r < kSliceRows; ++r) {
    for (int quad = 0; quad < kStepQuads; ++quad) {
      if (valid_meta(nibble(r, quad))) continue;
      return pack::encode_fault(PackFault::kMetadata, at.row + r, at.col + step * kStepCols + quad * kQuad, k);
    }
  }
  return kNoFault;
}

template <int kBits>
uint64_t import_slice(const ImportParams& p, const SliceOrigin& at, uint32_t* out) {
  std::array<uint32_t, slice_words(kBits)> words = kEmptySlice<kBits>;
  uint64_t fault = kNoFault;
  for (int step = 0; step < at.steps; ++step) {
    const int64_t step_row = at.col / kStepCols + step;
    const uint32_t* codes = p.codes + step_row * legacy::row_words(p.n, kBits) + at.code_at;
    const uint16_t* meta = p.meta + step_row * legacy::row_meta(p.n) + at.meta_at;
    uint32_t invalid = 0;
    for (int r = 0; r < kSliceRows; ++r) {
      for (int quad = 0; quad < kStepQuads; ++quad) {
        const Place& from = kRunPlaces<kBits>[at.run_row + r][quad];
        const Place& to = kSlicePlaces<kBits>[r][step * kStepQuads + quad];
        KeptQuad kept = load<kBits>(from, codes[from.code_word], meta[from.meta_word]);
        invalid |= legacy::rekeep<legacy::Convention::kNew>(kept, kBits);
        words[to.code_word] ^= code_bits<kBits>(to, kept);
        words[to.meta_word] ^= (kept.nibble ^ pack::canonical_nibble(0)) << to.nibble;
      }
    }
    if (invalid == 0) continue;
    fault = pack::min_fault(fault, meta_fault(at, step, p.k, [&](int r, int quad) {
                              const Place& from = kRunPlaces<kBits>[at.run_row + r][quad];
                              return static_cast<uint32_t>(meta[from.meta_word]) >> from.nibble & legacy::kNibble;
                            }));
  }
  std::copy(words.begin(), words.end(), out);
  return fault;
}

template <int kBits>
uint64_t export_slice(const ExportParams& p, const SliceOrigin& at, const uint32_t* words) {
  uint64_t fault = kNoFault;
  for (int step = 0; step < at.steps; ++step) {
    const int64_t step_row = at.col / kStepCols + step;
    uint32_t* codes = p.codes + step_row * legacy::row_words(p.n, kBits) + at.code_at;
    uint16_t* meta = p.meta + step_row * legacy::row_meta(p.n) + at.meta_at;
    // No other slice has a part in these words and values: they hold features 4 apart.
    for (int r = 0; r < kSliceRows; ++r) {
      for (const Place& to : kRunPlaces<kBits>[at.run_row + r]) codes[to.code_word] = meta[to.meta_word] = 0;
    }
    uint32_t invalid = 0;
    for (int r = 0; r < kSliceRows; ++r) {
      for (int quad = 0; quad < kStepQuads; ++quad) {
        const Place& from = kSlicePlaces<kBits>[r][step * kStepQuads + quad];
        const Place& to = kRunPlaces<kBits>[at.run_row + r][quad];
        KeptQuad kept = load<kBits>(from, words[from.code_word], words[from.meta_word]);
        invalid |= legacy::rekeep<legacy::Convention::kOld>(kept, kBits);
        codes[to.code_word] |= kept.first << to.first | kept.second << to.second;
        meta[to.meta_word] = static_cast<uint16_t>(meta[to.meta_word] | kept.nibble << to.nibble);
      }
    }
    if (invalid == 0) continue;
    fault = pack::min_fault(fault, meta_fault(at, step, p.k, [&](int r, int quad) {
                              const Place& from = kSlicePlaces<kBits>[r][step * kStepQuads + quad];
                              return words[from.meta_word] >> from.nibble & legacy::kNibble;
                            }));
  }
  return fault;
}

// Runs body(origin of a slice) -> fault over every slice and returns the smallest fault.
template <class Body>
PackStatus over_slices(int64_t n, int64_t k, int num_bits, const ParallelFor& parallel_for, const Body& body) {
  const int64_t cols = col_tiles(k), slices = n / kSliceRows * cols;
  constexpr int64_t kGrain = 16;
  std::atomic<uint64_t> first{kNoFault};
  parallel_for(slices, kGrain, [&](int64_t begin, int64_t end) {
    uint64_t fault = kNoFault;
    for (int64_t i = begin; i < end; ++i) {
      fault = pack::min_fault(fault, body(SliceOrigin(i / cols, i % cols, k, num_bits)));
    }
    uint64_t seen = first.load();
    while (fault < seen && !first.compare_exchange_weak(seen, fault)) {
    }
  });
  return pack::decode_fault(first.load(), n, k);
}

}  // namespace

PackStatus import_marlin_24_cpu(const ImportParams& p, const ParallelFor& parallel_for) {
  const int64_t row_words = packed_row_words(p.k, p.num_bits);
  return over_slices(p.n, p.k, p.num_bits, parallel_for, [&](const SliceOrigin& at) {
    uint32_t* out = p.packed + at.row / kTileRows * row_words + slice_offset_words(at.row, at.col, p.num_bits);
    return p.num_bits == 4 ? import_slice<4>(p, at, out) : import_slice<8>(p, at, out);
  });
}

PackStatus export_marlin_24_cpu(const ExportParams& p, const ParallelFor& parallel_for) {
  return over_slices(p.n, p.k, p.num_bits, parallel_for, [&](const SliceOrigin& at) {
    const uint32_t* words =
        p.packed + at.row / kTileRows * p.packed_row_words + slice_offset_words(at.row, at.col, p.num_bits);
    return p.num_bits == 4 ? export_slice<4>(p, at, words) : export_slice<8>(p, at, words);
  });
}

}  // namespace sparse_marlin
