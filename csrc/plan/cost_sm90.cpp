// The cost model of the Hopper kernel.
//
// Clusters walk over output tiles in rounds. A stage (one 128-column tile) takes a block the larger of what its wgmmas take and
// what its bytes take; a tile adds its epilogue, a launch its fixed cost, a split the second kernel.
#include <algorithm>
#include <cmath>

#include "plan/cost.h"
#include "plan/smem_sm90.h"

namespace sparse_marlin {
namespace {

constexpr double kCyclesPerUs = 1700;
constexpr double kTensorFactor = 1.05;  // tensor cores are held up by whatever else touches shared memory
constexpr double kRowTileCycles = 110;  // dequantizing 64 rows x 128 columns
constexpr double kEpilogueCycles = 1500;
constexpr double kLaunchUs = 3.0;  // launch, first bytes, last store
constexpr double kReduceUs = 1.2;  // the second kernel of a split
constexpr double kReduceBytesPerUsSm = 40e3;
constexpr double kDramBytesPerUsSm = 30e3;

double stage_cycles(const TileSm90& t) {
  // wgmma.sp m64nNk32 takes N / 2 cycles
  const double tensor = t.row_tiles() * format::kSliceSteps * t.block_m / 2.0;
  return kTensorFactor * tensor + kRowTileCycles * t.row_tiles();
}

}  // namespace

double predicted_us(const Problem& problem, const Device& device, const TileSm90& tile, const Plan& plan) {
  const double tiles_m = std::ceil(static_cast<double>(problem.m) / tile.block_m);
  const double tiles_n = std::ceil(static_cast<double>(problem.n) / (tile.block_n() * tile.cluster));
  const double items = tiles_m * tiles_n * plan.splits;
  const double rounds = std::ceil(items * tile.cluster / plan.grid);
  const double stages = std::ceil(static_cast<double>(format::col_tiles(problem.k)) / plan.splits);
  const double busy = rounds * (stages * stage_cycles(tile) + kEpilogueCycles) / kCyclesPerUs;
  const double bytes = static_cast<double>(format::tile_bytes(problem.num_bits)) * format::row_tiles(problem.n) *
                           format::col_tiles(problem.k) +
                       2.0 * problem.m * (problem.k + problem.n);
  double us = kLaunchUs + std::max(busy, bytes / (kDramBytesPerUsSm * device.num_sms));
  if (plan.splits > 1) {
    us +=
        kReduceUs + 2.0 * problem.m * problem.n * sizeof(float) * plan.splits / (kReduceBytesPerUsSm * device.num_sms);
  }
  return us;
}

}  // namespace sparse_marlin
