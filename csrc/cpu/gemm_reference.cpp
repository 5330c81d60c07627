// The multiplication by the plainest loops over the format's bijections, in float64. Tests compare everything with it.
#include <vector>

#include "cpu/gemm_cpu.h"
#include "cpu/half.h"

namespace sparse_marlin {
namespace {

using namespace format;

// Row `row` of the weight, dequantized and dense.
std::vector<double> dense_row(const Problem& problem, const GemmParams& params, int64_t row) {
  std::vector<double> dense(static_cast<size_t>(problem.k), 0.0);
  const int bits = problem.num_bits, slice_row = static_cast<int>(row % kSliceRows);
  const uint32_t code_mask = (1u << bits) - 1, meta_mask = (1u << kMetaBits) - 1;
  for (int64_t col = 0; col < problem.k; col += kQuad) {
    const uint32_t* slice =
        params.weights + row / kTileRows * params.weights_row_words + slice_offset_words(row, col, bits);
    const int quad = static_cast<int>(col % kTileCols / kQuad);
    const Location meta = meta_location(slice_row, quad, bits);
    const Pattern kept = meta_pattern(slice[meta.word] >> meta.shift & meta_mask);
    const int64_t group = problem.group_size == kChannelwise ? 0 : col / problem.group_size;
    const double scale = load_float(params.scales, problem.dtype, group * problem.n + row);
    for (int i = 0; i < kKeptPerQuad; ++i) {
      const Location at = code_location(slice_row, quad * kKeptPerQuad + i, bits);
      const int code = decode(slice[at.word] >> at.shift & code_mask, bits);
      dense[static_cast<size_t>(col + (i == 0 ? kept.first : kept.second))] += code * scale;
    }
  }
  return dense;
}

}  // namespace

void gemm_reference(const Problem& problem, const GemmParams& params) {
  for (int64_t row = 0; row < problem.n; ++row) {
    const std::vector<double> weight = dense_row(problem, params, row);
    for (int64_t token = 0; token < problem.m; ++token) {
      double sum = params.bias != nullptr ? load_float(params.bias, problem.dtype, row) : 0.0;
      for (int64_t col = 0; col < problem.k; ++col) {
        const double w = weight[static_cast<size_t>(col)];
        if (w != 0) sum += w * load_float(params.acts, problem.dtype, token * problem.k + col);
      }
      store_float(params.out, problem.dtype, token * problem.n + row, static_cast<float>(sum));
    }
  }
}

}  // namespace sparse_marlin
