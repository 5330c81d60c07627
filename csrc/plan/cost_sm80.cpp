// The cost model of the portable kernel.
//
// A block is charged its main loop: per 128-column tile the larger of tensor-core, shared-memory and instruction time, as if it had its share of
// the SM; blocks run in waves; the whole grid cannot beat the bytes it moves. Rates are those of an H100 or H200 scaled by the number
// of SMs, since the ranking of plans is what matters, not the microseconds.
#include <algorithm>
#include <cmath>

#include "plan/cost.h"
#include "plan/smem.h"

namespace sparse_marlin {
namespace {

constexpr double kClockGhz = 1.7;
constexpr double kMmaCycles = 8.5;           // one mma.sp m16n8k32 on one of the SM's four tensor cores, seen in the main loop
constexpr double kSliceCycles = 26;          // dequantizing one slice step in one warp: issue slots of one of four schedulers
constexpr double kSchedulers = 4;
constexpr double kTileLatency = 500;         // cycles from a stage's arrival to its last MMA, when nothing overlaps it
constexpr double kDramBytesPerUsSm = 25000;  // 3.3 TB/s over 132 SMs
constexpr double kL2BytesPerUsSm = 42000;    // 5.5 TB/s over 132 SMs
constexpr double kLaunchUs = 2.2;            // launch, first bytes, last store
constexpr double kReduceUs = 1.6;            // a second kernel
constexpr int kRegisters = 65536;
constexpr int kSmemReserved = 1024;          // bytes a block costs beside its own

int blocks_per_sm(const Device& device, const Tile& tile, const Plan& plan) {
  const int by_smem = device.smem_per_sm / (plan.smem_bytes + kSmemReserved);
  const int max_threads = device.compute_capability == 86 || device.compute_capability == 89 ? 1536 : 2048;
  return std::max(1, std::min({by_smem, max_threads / tile.threads(), tile.min_blocks}));
}

}  // namespace

double predicted_us(const Problem& problem, const Device& device, const Tile& tile, const Plan& plan) {
  const double tiles_m = std::ceil(static_cast<double>(problem.m) / tile.block_m);
  const double tiles_n = std::ceil(static_cast<double>(problem.n) / tile.block_n);
  const double col_tiles = static_cast<double>(format::col_tiles(problem.k));
  const double share = std::ceil(col_tiles / plan.splits);         // 128-column tiles a block
  const double turns = std::ceil(share / tile.warps_k);            // a team
  const double blocks = tiles_m * tiles_n * plan.splits;
  const int resident = blocks_per_sm(device, tile, plan);
  const double waves = std::ceil(blocks / (static_cast<double>(device.num_sms) * resident));
  const double on_sm = std::min<double>(resident, std::ceil(blocks / device.num_sms));

  // cycles an SM needs for one turn of all its resident blocks
  const double mmas = tile.slices() * (tile.block_m / kMmaTokens) * format::kSliceSteps * tile.warps_k;
  const double slices = tile.slices() * tile.warps_m * format::kSliceSteps * tile.warps_k;
  const double turn = std::max(on_sm * (mmas * kMmaCycles + slices * kSliceCycles * 0.5) / kSchedulers, kTileLatency);
  const double compute_us = waves * turns * turn / (kClockGhz * 1000);

  const double weights = tiles_n * tile.slices() * format::slice_bytes(problem.num_bits) * col_tiles;
  const double acts = static_cast<double>(problem.m) * problem.k * kActBytes;
  const double out = static_cast<double>(problem.m) * problem.n * kActBytes;
  const double dram_us = (weights + acts + out) / (kDramBytesPerUsSm * device.num_sms);
  const double l2_us = (weights * tiles_m + acts * tiles_n) / (kL2BytesPerUsSm * device.num_sms);
  double us = kLaunchUs + std::max({compute_us, dram_us, l2_us});
  if (plan.splits > 1) {
    const double partial = static_cast<double>(problem.m) * problem.n * sizeof(float) * plan.splits;
    us += kReduceUs + 2 * partial / (kL2BytesPerUsSm * device.num_sms);
  }
  return us;
}

}  // namespace sparse_marlin
