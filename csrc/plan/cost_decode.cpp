// The cost model of the decode kernel.
//
// Blocks walk over output tiles, two at a time on an SM. A warp's column tile costs its share of the schedulers, and a turn a latency;
// the grid cannot beat the bytes it moves.
#include <algorithm>
#include <cmath>

#include "plan/cost.h"
#include "plan/smem_decode.h"

namespace sparse_marlin {
namespace {

constexpr double kCyclesPerUs = 1750;
constexpr double kSchedulers = 4;
constexpr double kSliceCycles = 60;  // a slice of a column tile: dequantization and what goes with it
constexpr double kMmaCycles = 20;    // and for each block of 8 tokens
constexpr double kTurnCycles = 60;   // a column tile of a warp, whatever its size
constexpr double kTurnLatency = 350;
constexpr double kTileCycles = 700;  // the end of an output tile
constexpr double kLaunchUs = 2.0;
constexpr double kDramBytesPerUsSm = 32e3;
constexpr double kL2BytesPerUsSm = 60e3;
constexpr double kOverlapPower = 3.0;

}  // namespace

double predicted_us(const Problem& problem, const Device& device, const TileDecode& tile, const Plan& plan) {
  const double sms = device.num_sms, tiles = static_cast<double>(tiles_decode(problem, tile));
  const double rounds = std::ceil(tiles / static_cast<double>(plan.grid));
  const double per_sm = std::ceil(tiles / sms);  // output tiles an SM works on
  const double cols = static_cast<double>(turns(tile, problem.k)) * tile.turn_cols * tile.warps_k;

  const double column = tile.slices * (kSliceCycles + kMmaCycles * tile.token_blocks()) + kTurnCycles;
  const double issue = per_sm * cols * tile.warps_n * column / kSchedulers;
  const double latency = rounds * (turns(tile, problem.k) * kTurnLatency + kTileCycles);
  const double weights =
      static_cast<double>(format::tile_bytes(problem.num_bits)) * format::row_tiles(problem.n) * cols;
  const double acts = static_cast<double>(problem.m) * problem.k * kActBytes;
  const double dram_us = weights / (kDramBytesPerUsSm * sms);
  const double l2_us = (weights + acts * tiles) / (kL2BytesPerUsSm * sms);
  const double sum = std::pow(issue / kCyclesPerUs, kOverlapPower) + std::pow(latency / kCyclesPerUs, kOverlapPower) +
                     std::pow(dram_us, kOverlapPower) + std::pow(l2_us, kOverlapPower);
  return kLaunchUs + std::pow(sum, 1 / kOverlapPower);
}

}  // namespace sparse_marlin
