// The cost model of the portable kernel, fitted to 7807 measured plans (11 weight shapes, 1 to 2048 tokens, H200; 4-bit codes, group
// 128; docs/KERNEL_SM80.md): the plan it picks is 1.2 % slower than the best measured one on average.
//
// Blocks run in waves, as many at once as an SM holds. In one turn every team of a block does one 128-column tile; a turn of an SM
// costs the cycles its schedulers are busy, plus a latency nothing hides, plus the queueing of copies. The grid cannot beat the
// bytes it moves. The constants are cycles of a Hopper SM; on other GPUs they rank plans, they do not predict microseconds.
#include <algorithm>
#include <cmath>

#include "plan/cost.h"
#include "plan/smem.h"

namespace sparse_marlin {
namespace {

constexpr double kCyclesPerUs = 1750;
constexpr double kSchedulers = 4;
constexpr double kMmaCycles = 7.7;     // an MMA: tensor core and the instructions around it
constexpr double kSliceCycles = 11.9;  // dequantizing a slice step in one warp
constexpr double kCopyCycles = 9.0;    // one asynchronous copy of a warp (512 B): issue
constexpr double kCopyLatency = 10.3;  // and its share of the latency below
constexpr double kTurnLatency = 565;   // barrier, first loads from shared memory, first dequantization
constexpr double kQueueCycles = 43;    // copies of kQueueWarps warps waiting for each other, one stage ahead
constexpr double kQueueWarps = 8;
constexpr double kQueuePower = 2.09;
constexpr double kEpilogueCycles = 49;      // an element of the block's tile, for each thread and team
constexpr double kLaunchUs = 2.5;           // launch, first bytes, last store
constexpr double kReduceUs = 2.1;           // the second kernel of a split
constexpr double kDependentUs = 1.1;        // what dependent launch hides of the launch
constexpr double kReduceDependentUs = 3.6;  // the same where launches overlap: it keeps the next kernel waiting
constexpr double kReduceBytesPerUsSm = 75e3;
constexpr double kL2BytesPerUsSm = 137e3;
constexpr double kRunBytes = 566;      // a run of so many bytes of weights takes twice as long as its bytes
constexpr double kOverlapPower = 3.4;  // between max (infinity) and sum (1) of arithmetic and bytes
constexpr int kSmemReserved = 1024;    // bytes a block costs beside its own

// DRAM bandwidth is no property the driver reports; by generation, bytes a microsecond and SM.
double dram_bytes_per_us_sm(const Device& device) {
  switch (device.compute_capability) {
    case 80: return 18e3;  // A100
    case 86:
    case 89: return 8e3;   // GDDR6
    case 90: return 36e3;  // H200; an H100 has 25e3
    default: return device.compute_capability >= 120 ? 10e3 : 50e3;
  }
}

int blocks_per_sm(const Device& device, const Tile& tile, const Plan& plan) {
  const int by_smem = device.smem_per_sm / (plan.smem_bytes + kSmemReserved);
  const bool few_threads = device.compute_capability == 86 || device.compute_capability == 89;
  const int by_threads = (few_threads ? 1536 : 2048) / tile.threads();
  return std::max(1, std::min({by_smem, by_threads, tile.min_blocks}));
}

// Cycles an SM takes for `turns` turns of `blocks` blocks side by side, epilogue included.
double wave_cycles(const Problem& problem, const Tile& tile, const Plan& plan, double turns, double blocks) {
  const double slices = tile.warp_n() / format::kSliceRows * format::kSliceSteps;
  const double mmas = slices * (tile.warp_m() / kMmaTokens);
  const double tokens = static_cast<double>(std::min<int64_t>(tile.block_m, problem.m));
  const double copied = weight_stage_bytes(tile, problem.num_bits) + tokens * kActRowBytes;
  const double copies = copied / (kCopyBytes * format::kLanes) / tile.team_warps();
  const double warps = tile.threads() / format::kLanes * blocks;
  const double busy = (mmas * kMmaCycles + slices * kSliceCycles + copies * kCopyCycles) * warps / kSchedulers;
  const double queue = kQueueCycles / (plan.num_stages - 1) * std::pow(warps / kQueueWarps, kQueuePower);
  const double epilogue = kEpilogueCycles * tile.block_m * tile.block_n * tile.warps_k / tile.threads() * blocks;
  return turns * (busy + kTurnLatency + copies * kCopyLatency + queue) + epilogue;
}

}  // namespace

double predicted_us(const Problem& problem, const Device& device, const Tile& tile, const Plan& plan) {
  const double tiles_m = std::ceil(static_cast<double>(problem.m) / tile.block_m);
  const double tiles_n = std::ceil(static_cast<double>(problem.n) / tile.block_n);
  const double col_tiles = static_cast<double>(format::col_tiles(problem.k));
  const double turns = std::ceil(std::ceil(col_tiles / plan.splits) / tile.warps_k);
  const double sms = device.num_sms, resident = blocks_per_sm(device, tile, plan);
  const double blocks = tiles_m * tiles_n * plan.splits;
  const double full_waves = std::floor(blocks / (sms * resident)), rest = blocks - full_waves * sms * resident;
  double cycles = full_waves * wave_cycles(problem, tile, plan, turns, resident);
  if (rest > 0) cycles += wave_cycles(problem, tile, plan, turns, std::ceil(rest / sms));

  const double weights = tiles_n * weight_stage_bytes(tile, problem.num_bits) * col_tiles;
  const double acts = static_cast<double>(problem.m) * problem.k * kActBytes;
  const double out = static_cast<double>(problem.m) * problem.n * kActBytes;
  const double dram_us = (weights + acts + out) / (dram_bytes_per_us_sm(device) * sms);
  const double l2_us = (weights * tiles_m + acts * tiles_n) / (kL2BytesPerUsSm * sms);
  const double sum = std::pow(cycles / kCyclesPerUs, kOverlapPower) + std::pow(dram_us, kOverlapPower) +
                     std::pow(l2_us, kOverlapPower);
  const double hidden = device.compute_capability >= 90 ? kDependentUs : 0;
  // short runs of weights: a block of 16 features reads 768 bytes at a time
  const double run = static_cast<double>(std::min(tile.block_n, format::kTileRows)) / format::kSliceRows *
                     format::slice_bytes(problem.num_bits);
  const double scattered = 1 + std::pow(kRunBytes / run, 3);
  double us = kLaunchUs - hidden + scattered * std::pow(sum, 1 / kOverlapPower);
  if (plan.splits > 1) {
    const double partial = static_cast<double>(problem.m) * problem.n * sizeof(float) * plan.splits;
    us += (hidden > 0 ? kReduceDependentUs : kReduceUs) + 2 * partial / (kReduceBytesPerUsSm * sms);
  }
  return us;
}

}  // namespace sparse_marlin
