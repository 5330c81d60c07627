// The cost model of the Hopper kernel, fitted to 1071 measured plans (4 weight shapes, 16 to 4096 tokens, H200; 4-bit codes, group
// 128; docs/KERNEL_SM90.md): of these, the plan it picks is 1.0 % slower than the best one on average.
//
// Clusters walk over output tiles in rounds. A stage (one 128-column tile) takes as long as dequantizing its weights or as wgmma.sp
// reading its activations from shared memory, whichever is longer, and somewhat more where both are near; a tile adds its
// epilogue, a launch its fixed cost, a split the exchange. The grid cannot beat the bytes it moves.
#include <algorithm>
#include <cmath>

#include "plan/cost.h"
#include "plan/smem_sm90.h"

namespace sparse_marlin {
namespace {

constexpr double kStageUs = 0.175;            // whatever the tile: barrier, first loads, first dequantization
constexpr double kRowTileUs = 0.0584;         // dequantizing 64 rows x 128 columns
constexpr double kReadUs = 0.00116;           // wgmma.sp: a token of a row tile and stage
constexpr double kStagePower = 2.8;           // between max (infinity) and sum (1) of the two
constexpr double kEpilogueUs = 0.0158;        // a token of a row tile
constexpr double kLaunchUs = 1.25;            // dependent launch, first bytes, last store
constexpr double kExchangeUs = 0.2;           // of sums: the cluster meets twice,
constexpr double kExchangeSplitUs = 0.755;    // and every split adds to what is sent and summed
constexpr double kDramBytesPerUsSm = 24.4e3;  // H200; what a grid of few blocks gets of it
constexpr double kOverlapPower = 3.0;         // of arithmetic and bytes

double stage_us(const ShapeSm90& t) {
  const double dequantize = kStageUs + kRowTileUs * t.row_tiles();
  const double read = kReadUs * t.row_tiles() * t.block_m;
  return std::pow(std::pow(dequantize, kStagePower) + std::pow(read, kStagePower), 1 / kStagePower);
}

// Clusters of `size` blocks that run at once: an H100 or H200 has 132 SMs, in groups of 16 or 18 of which some miss one.
double resident_clusters(const Device& device, int size) {
  constexpr double kSms = 132;
  constexpr double kResident[kMaxCluster] = {132, 66, 39, 30, 22, 17, 15, 15};
  return std::max(1.0, std::floor(kResident[size - 1] * device.num_sms / kSms));
}

}  // namespace

double predicted_us(const Problem& problem, const Device& device, const TileSm90& tile, const Plan& plan) {
  const ShapeSm90& shape = tile.size();
  const double tiles_m = std::ceil(static_cast<double>(problem.m) / shape.block_m);
  const double tiles_n = std::ceil(static_cast<double>(problem.n) / (shape.block_n() * tile.share));
  const double rounds = std::ceil(tiles_m * tiles_n / resident_clusters(device, tile.share * plan.splits));
  const double stages = std::ceil(static_cast<double>(format::col_tiles(problem.k)) / plan.splits);
  const double busy_us = rounds * (stages * stage_us(shape) + kEpilogueUs * shape.row_tiles() * shape.block_m);
  const double weights = static_cast<double>(format::tile_bytes(problem.num_bits)) * format::row_tiles(problem.n) *
                         format::col_tiles(problem.k);
  const double acts_and_out = static_cast<double>(problem.m) * (problem.k + problem.n) * kActBytes;
  const double dram_us = (weights + acts_and_out) / (kDramBytesPerUsSm * device.num_sms);
  const double us =
      kLaunchUs + std::pow(std::pow(busy_us, kOverlapPower) + std::pow(dram_us, kOverlapPower), 1 / kOverlapPower);
  return us + (plan.splits > 1 ? kExchangeUs + kExchangeSplitUs * plan.splits : 0);
}

}  // namespace sparse_marlin
