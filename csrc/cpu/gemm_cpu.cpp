// The CPU multiplication around the slice kernels: which instruction set, activations to float32, threads, scales,
// bias, rounding.
//
// Work is cut into strips of 16 rows by chunks of tokens; one thread computes an output element, over k in rising
// order, so the result does not depend on how many threads there are. A thread walks up to four strips of a row tile
// together: their packed bytes are neighbours in memory, and the activations of a column tile are read once from the
// outer cache.
#include "cpu/gemm_cpu.h"

#include <algorithm>
#include <cstddef>
#include <memory>

#include "cpu/half.h"
#include "cpu/kernels.h"

#if defined(SPARSE_MARLIN_X86)
#include <cpuid.h>
#endif

namespace sparse_marlin {
namespace {

using namespace format;
using cpu::DecodedPairs;
using cpu::DecodedSlice;
using cpu::Kernels;

// Tokens that share one decoding of a slice: more make decoding cheaper, but their sums (64 bytes a token and strip)
// and activations (512 bytes a token and column tile) must stay in the second-level cache.
constexpr int64_t kChunkTokens = 128;
// Tokens whose activations are held in float32 at a time: bounds the scratch memory.
constexpr int64_t kPassTokens = 512;
// Multiply-adds that are worth a task of their own on the thread pool.
constexpr int64_t kTaskWork = 1 << 18;

const Kernels& kernels_of(CpuIsa isa) {
#if defined(SPARSE_MARLIN_X86)
  if (isa == CpuIsa::kBest) isa = cpu_isa_best();
  if (isa == CpuIsa::kAvx512Bf16) return cpu::avx512_bf16_kernels();
  if (isa == CpuIsa::kAvx512) return cpu::avx512_kernels();
  if (isa == CpuIsa::kAvx2) return cpu::avx2_kernels();
#endif
  return cpu::portable_kernels();
}

// One pass over the weight: `tokens` tokens from `first_token` on.
struct Pass {
  const Problem& problem;
  const GemmParams& params;
  const Kernels& kernels;
  void* acts;  // [col_tiles][tokens][kTileCols], zero in the padding: float32, or in pairs bfloat16
  int64_t first_token;
  int64_t tokens;

  // A single token waits for memory: it gains nothing.
  bool in_pairs() const { return kernels.multiply_pairs != nullptr && problem.dtype == DType::kBFloat16 && tokens > 1; }
  template <typename T>
  T* acts_at(int64_t col_tile, int64_t token) const {
    return static_cast<T*>(acts) + (col_tile * tokens + token) * kTileCols;
  }
};

// The scales of one strip for the current column tile, in float32.
class StripScales {
 public:
  StripScales(const Pass& pass, int64_t row) : pass_(pass), row_(row) {}

  // Points out[step] at the scales of every step of column tile `col_tile`.
  void select(int64_t col_tile, const float* (&out)[kSliceSteps]) {
    const Problem& p = pass_.problem;
    const int64_t last = num_groups(p.k, p.group_size) - 1;
    for (int step = 0; step < kSliceSteps; ++step) {
      const int64_t col = col_tile * kTileCols + step * kStepCols;
      const int64_t group = p.group_size == kChannelwise ? 0 : std::min(col / p.group_size, last);
      if (group != group_) {
        slot_ = (slot_ + 1) % kSliceSteps;
        load(group);
      }
      out[step] = values_[slot_];
    }
  }

 private:
  void load(int64_t group) {
    const Problem& p = pass_.problem;
    const int64_t rows = std::min<int64_t>(p.n - row_, kSliceRows);
    const char* from = static_cast<const char*>(pass_.params.scales) + (group * p.n + row_) * dtype_bytes(p.dtype);
    if (group + 1 < num_groups(p.k, p.group_size)) __builtin_prefetch(from + p.n * dtype_bytes(p.dtype));
    pass_.kernels.load(from, p.dtype, rows, values_[slot_]);
    group_ = group;
  }

  const Pass& pass_;
  int64_t row_;
  int64_t group_ = -1;
  int slot_ = 0;
  alignas(64) float values_[kSliceSteps][kSliceRows] = {};
};

void write_strip(const Pass& pass, int64_t row, int64_t token, int64_t tokens, float* sums) {
  const Problem& p = pass.problem;
  const int64_t rows = std::min<int64_t>(p.n - row, kSliceRows);
  float bias[kSliceRows] = {};
  const int64_t element = dtype_bytes(p.dtype);
  if (pass.params.bias != nullptr) {
    pass.kernels.load(static_cast<const char*>(pass.params.bias) + row * element, p.dtype, rows, bias);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    float* sum = sums + t * kSliceRows;
    if (pass.params.bias != nullptr) {
      for (int r = 0; r < kSliceRows; ++r) sum[r] += bias[r];
    }
    char* out = static_cast<char*>(pass.params.out) + ((pass.first_token + token + t) * p.n + row) * element;
    pass.kernels.store(sum, p.dtype, rows, out);
  }
}

// With few tokens time is memory's: a strip's weights of the next column tile are asked for while this one is multiplied, and
// in StripScales::load the scales of the next group, each of which lies on a page of its own.
void prefetch(const uint32_t* words, int count) {
  constexpr int kLineWords = 64 / sizeof(uint32_t);
  for (int i = 0; i < count; i += kLineWords) __builtin_prefetch(words + i);
}

// `strips` strips of one row tile, from `strip` on, times `tokens` tokens of the pass from `token` on.
void multiply_strips(const Pass& pass, int64_t strip, int strips, int64_t token, int64_t tokens) {
  const Problem& p = pass.problem;
  const int64_t row = strip * kSliceRows, cols = col_tiles(p.k);
  alignas(64) float sums[kTileSlices][kChunkTokens * kSliceRows];
  StripScales scales[kTileSlices] = {
      {pass, row}, {pass, row + kSliceRows}, {pass, row + 2 * kSliceRows}, {pass, row + 3 * kSliceRows}};
  for (int s = 0; s < strips; ++s) std::fill_n(sums[s], tokens * kSliceRows, 0.0f);

  DecodedSlice decoded;
  DecodedPairs pairs;
  const uint32_t* tile_row = pass.params.weights + row / kTileRows * pass.params.weights_row_words;
  for (int64_t col_tile = 0; col_tile < cols; ++col_tile) {
    for (int s = 0; s < strips; ++s) {
      const uint32_t* slice = tile_row + slice_offset_words(row + s * kSliceRows, col_tile * kTileCols, p.num_bits);
      const float* step_scales[kSliceSteps];
      if (col_tile + 1 < cols) prefetch(slice + tile_words(p.num_bits), slice_words(p.num_bits));
      scales[s].select(col_tile, step_scales);
      if (pass.in_pairs()) {
        pass.kernels.decode_pairs(slice, p.num_bits, pairs);
        pass.kernels.multiply_pairs(pairs, step_scales, pass.acts_at<const uint16_t>(col_tile, token), tokens, sums[s]);
      } else if (tokens == 1) {
        pass.kernels.multiply_one(slice, p.num_bits, step_scales, pass.acts_at<const float>(col_tile, token), sums[s]);
      } else {
        pass.kernels.decode(slice, p.num_bits, step_scales, decoded);
        pass.kernels.multiply(decoded, pass.acts_at<const float>(col_tile, token), tokens, sums[s]);
      }
    }
  }
  for (int s = 0; s < strips; ++s) write_strip(pass, row + s * kSliceRows, token, tokens, sums[s]);
}

// Activations of the pass, a column tile's tokens side by side: rows a power of two apart would share cache sets.
void load_acts(const Pass& pass, const ParallelFor& parallel_for) {
  const Problem& p = pass.problem;
  const int64_t cols = col_tiles(p.k), grain = std::max<int64_t>(1, kTaskWork / (cols * kTileCols));
  parallel_for(pass.tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const char* from =
          static_cast<const char*>(pass.params.acts) + (pass.first_token + token) * p.k * dtype_bytes(p.dtype);
      for (int64_t col_tile = 0; col_tile < cols; ++col_tile) {
        const int64_t col = col_tile * kTileCols, width = std::min<int64_t>(p.k - col, kTileCols);
        if (pass.in_pairs()) {
          auto* to = pass.acts_at<uint16_t>(col_tile, token);
          std::copy_n(reinterpret_cast<const uint16_t*>(from) + col, width, to);
          std::fill(to + width, to + kTileCols, uint16_t{0});
          continue;
        }
        auto* to = pass.acts_at<float>(col_tile, token);
        pass.kernels.load(from + col * dtype_bytes(p.dtype), p.dtype, width, to);
        std::fill(to + width, to + kTileCols, 0.0f);
      }
    }
  });
}

void run_pass(const Pass& pass, const ParallelFor& parallel_for) {
  const Problem& p = pass.problem;
  const int64_t strips = (p.n + kSliceRows - 1) / kSliceRows;
  const int64_t chunks = (pass.tokens + kChunkTokens - 1) / kChunkTokens;
  const int64_t strip_work = col_tiles(p.k) * kTileCols * kSliceRows * std::min(pass.tokens, kChunkTokens);
  const int64_t grain = std::max<int64_t>(1, kTaskWork / strip_work);
  parallel_for(strips * chunks, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t strip = begin % strips, token = begin / strips * kChunkTokens;
      const int64_t count = std::min({end - begin, strips - strip, kTileSlices - strip % kTileSlices});
      multiply_strips(pass, strip, static_cast<int>(count), token, std::min(pass.tokens - token, kChunkTokens));
      begin += count;
    }
  });
}

#if defined(SPARSE_MARLIN_X86)
// Not among the names that every compiler's __builtin_cpu_supports knows.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

}  // namespace

bool cpu_isa_available(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kBest:
    case CpuIsa::kPortable: return true;
#if defined(SPARSE_MARLIN_X86)
    case CpuIsa::kAvx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case CpuIsa::kAvx512: return cpu_isa_available(CpuIsa::kAvx2) && __builtin_cpu_supports("avx512f");
    case CpuIsa::kAvx512Bf16:
      return cpu_isa_available(CpuIsa::kAvx512) && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512bf16");
#endif
    default: return false;
  }
}

CpuIsa cpu_isa_best() {
  static const CpuIsa best = [] {
    for (CpuIsa isa : {CpuIsa::kAvx512Bf16, CpuIsa::kAvx512, CpuIsa::kAvx2}) {
      if (cpu_isa_available(isa)) return isa;
    }
    return CpuIsa::kPortable;
  }();
  return best;
}

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kBest: return cpu_isa_name(cpu_isa_best());
    case CpuIsa::kPortable: return "portable";
    case CpuIsa::kAvx2: return "avx2";
    case CpuIsa::kAvx512: return "avx512";
    case CpuIsa::kAvx512Bf16: return "avx512_bf16";
  }
  return "unknown";
}

void gemm_cpu(const Problem& problem, const GemmParams& params, const ParallelFor& parallel_for, CpuIsa isa) {
  if (problem.m == 0 || problem.n == 0) return;
  const Kernels& kernels = kernels_of(isa);
  const int64_t pass_tokens = std::min(problem.m, kPassTokens);
  const auto acts = std::make_unique_for_overwrite<std::byte[]>(
      static_cast<size_t>(pass_tokens * col_tiles(problem.k) * kTileCols) * sizeof(float));
  for (int64_t token = 0; token < problem.m; token += pass_tokens) {
    const Pass pass{problem, params, kernels, acts.get(), token, std::min(pass_tokens, problem.m - token)};
    load_acts(pass, parallel_for);
    run_pass(pass, parallel_for);
  }
}

}  // namespace sparse_marlin
