// Choose among the candidates.
#include "plan/plan.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <vector>

#include "plan/candidates.h"
#include "plan/low_rank.h"
#include "plan/tiles_all.h"

namespace sparse_marlin {
namespace {

constexpr int kMinComputeCapability = 80;
constexpr int kMaxSplits = 16;      // that plan_with_tile takes
constexpr double kProductsUs = 12;  // two dense products of few tokens, measured on an H100, whatever the layer
// Our kernel for the first one takes half of that, and longer with more in features than these (70B down, 16 tokens: 11 us).
constexpr double kProductCols = 14336;

const Candidate* best(const std::vector<Candidate>& all) {
  const Candidate* chosen = nullptr;
  for (const Candidate& c : all) {
    if (c.rejected.empty() && (chosen == nullptr || c.plan.predicted_us < chosen->plan.predicted_us)) chosen = &c;
  }
  return chosen;
}

std::string tile_text(int tile) {
  char text[96];
  if (family(tile) == Family::kDecode) {
    const TileDecode& t = tile_decode(tile);
    std::snprintf(text, sizeof(text), "%3d tokens x %3d features, decode, warps %d x %d along k", t.block_m,
                  t.block_n(), t.warps_n, t.warps_k);
    return text;
  }
  if (family(tile) == Family::kSm90) {
    const ShapeSm90& t = tile_sm90(tile).size();
    std::snprintf(text, sizeof(text), "%3d tokens x %3d features, wgmma.sp, %d x %d panels, %d teams, %d share",
                  t.block_m, t.block_n(), t.team_size(), t.panels, t.teams, tile_sm90(tile).share);
    return text;
  }
  const Tile& t = kTiles[tile];
  std::snprintf(text, sizeof(text), "%3d tokens x %3d features, warps %d x %d x %d along k", t.block_m, t.block_n,
                t.warps_m, t.warps_n, t.warps_k);
  return text;
}

std::string problem_text(const Problem& p) {
  char text[160];
  std::snprintf(text, sizeof(text), "m=%lld n=%lld k=%lld group_size=%d num_bits=%d %s%s", static_cast<long long>(p.m),
                static_cast<long long>(p.n), static_cast<long long>(p.k), p.group_size, p.num_bits, dtype_name(p.dtype),
                p.has_bias ? " with bias" : "");
  return text;
}

}  // namespace

std::string why_unsupported(const Problem& p, const Device& device) {
  if (p.dtype == DType::kFloat32) return "expected float16 or bfloat16 activations on a GPU, got float32";
  if (!format::valid_bits(p.num_bits)) return "expected num_bits 4 or 8, got " + std::to_string(p.num_bits);
  if (!valid_group_size(p.group_size))
    return "expected group_size -1, 32, 64, 128 or 256, got " + std::to_string(p.group_size);
  if (p.m < 0 || p.m > kMaxTokens)
    return "expected 0 to " + std::to_string(kMaxTokens) + " tokens, got " + std::to_string(p.m);
  if (p.n < 1 || p.n > kMaxFeatures)
    return "expected 1 to " + std::to_string(kMaxFeatures) + " out features, got " + std::to_string(p.n);
  if (p.k < kColMultiple || p.k > kMaxFeatures || p.k % kColMultiple != 0)
    return "expected in features that are a multiple of 4, at most " + std::to_string(kMaxFeatures) + ", got " +
           std::to_string(p.k);
  if (device.compute_capability < kMinComputeCapability) {
    return "expected a GPU of compute capability 8.0 or higher, got " + std::to_string(device.compute_capability / 10) +
           "." + std::to_string(device.compute_capability % 10);
  }
  return {};
}

Plan plan(const Problem& problem, const Device& device) {
  const std::string why = why_unsupported(problem, device);
  if (!why.empty()) throw std::invalid_argument(why);
  const std::vector<Candidate> all = candidates(problem, device);
  const Candidate* chosen = best(all);
  if (chosen == nullptr) throw std::invalid_argument("no kernel fits " + problem_text(problem) + " on this GPU");
  return chosen->plan;
}

Plan plan_low_rank(const Problem& problem, const Device& device, int64_t rank, bool packed) {
  const Plan plain = plan(problem, device);
  if (rank < 1 || rank > kMaxRankPacked) return plain;
  Plan chosen = plain;
  // Another kernel may multiply faster, but not by what products cost beside it. Those of a packed factor are many small steps.
  double least = packed ? std::numeric_limits<double>::infinity() : plain.predicted_us + kProductsUs;
  const double project_us = kProductsUs / 2 * std::max(1.0, static_cast<double>(problem.k) / kProductCols);
  for (const Candidate& c : candidates(problem, device, {static_cast<int>(rank), packed})) {
    if (!c.rejected.empty()) continue;
    const double us = c.plan.predicted_us + (c.plan.project_blocks == 0 ? project_us : 0);
    if (us < least) {
      least = us;
      chosen = c.plan;
    }
  }
  return chosen;
}

namespace {

Plan with_tile(const Problem& problem, const Device& device, int tile, int splits, const Correction& correction) {
  const std::string why = why_unsupported(problem, device);
  if (!why.empty()) throw std::invalid_argument(why);
  if (tile < 0 || tile >= kNumTiles) {
    throw std::invalid_argument("tile: expected 0 to " + std::to_string(kNumTiles - 1) + ", got " +
                                std::to_string(tile));
  }
  if (splits > kMaxSplits) {
    throw std::invalid_argument("splits: expected at most " + std::to_string(kMaxSplits) + ", got " +
                                std::to_string(splits));
  }
  if (splits < 0 && family(tile) != Family::kSm90) {
    throw std::invalid_argument("splits: expected 0 or more, got " + std::to_string(splits) +
                                ": only the wgmma.sp kernel does stream-K");
  }
  Candidate chosen = build(problem, device, tile, splits == 0 ? 1 : splits, correction);
  for (int s : splits_of(tile)) {
    if (splits != 0) break;
    Candidate c = build(problem, device, tile, s, correction);
    const bool better = !chosen.rejected.empty() || c.plan.predicted_us < chosen.plan.predicted_us;
    if (c.rejected.empty() && better) chosen = c;
  }
  if (!chosen.rejected.empty()) {
    throw std::invalid_argument("tile " + std::to_string(tile) + " (" + tile_text(tile) + "): " + chosen.rejected);
  }
  return chosen.plan;
}

}  // namespace

Plan plan_with_tile(const Problem& problem, const Device& device, int tile, int splits) {
  return with_tile(problem, device, tile, splits, {});
}

Plan plan_low_rank_with_tile(const Problem& problem, const Device& device, int64_t rank, int tile, int splits,
                             bool packed) {
  const int narrowed = static_cast<int>(std::clamp<int64_t>(rank, -1, kMaxRankPacked + 1));
  return with_tile(problem, device, tile, splits, {narrowed == 0 ? -1 : narrowed, packed});
}

std::string explain(const Problem& problem, const Device& device) {
  std::string text = problem_text(problem) + "\n";
  char line[256];
  std::snprintf(line, sizeof(line), "device: compute capability %d.%d, %d SMs, %d KiB of shared memory a block\n",
                device.compute_capability / 10, device.compute_capability % 10, device.num_sms,
                device.smem_per_block >> 10);
  text += line;
  const std::string why = why_unsupported(problem, device);
  if (!why.empty()) return text + "not supported: " + why + "\n";
  const std::vector<Candidate> all = candidates(problem, device);
  const Candidate* chosen = best(all);
  // of each tile the best split, or the reason it has none
  for (int tile = 0; tile < kNumTiles; ++tile) {
    const Candidate* of_tile = nullptr;
    for (const Candidate& c : all) {
      if (c.plan.tile != tile) continue;
      const bool better =
          of_tile == nullptr ||
          (c.rejected.empty() && (!of_tile->rejected.empty() || c.plan.predicted_us < of_tile->plan.predicted_us));
      if (better) of_tile = &c;
    }
    const std::string name = tile_text(tile);
    if (!of_tile->rejected.empty()) {
      text += "  " + name + ": rejected, " + of_tile->rejected + "\n";
      continue;
    }
    const Plan& p = of_tile->plan;
    const std::string splits =
        p.splits < 0 ? " stream-K" : (p.splits < 10 ? " " : "") + std::to_string(p.splits) + " splits";
    std::snprintf(line, sizeof(line), "%s %s: %s, %d stages, %6lld blocks, %6d B shared, %8.1f us predicted\n",
                  of_tile == chosen ? " *" : "  ", name.c_str(), splits.c_str(), p.num_stages,
                  static_cast<long long>(p.grid), p.smem_bytes, p.predicted_us);
    text += line;
  }
  return text;
}

}  // namespace sparse_marlin
