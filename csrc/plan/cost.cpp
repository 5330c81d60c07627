// The cost model: one formula for all kernels, with constants of each tile (plan/cost_table.h, fitted by benchmarks/fit_plan.py).
//
//   us = launch + behind + late + crowding + sum over phases of (work^p + (c dram)^p + (d l2)^p)^(1/p) + exchanges
//   work = turns x (sum over waves of turn + turn_block x blocks an SM holds) + tile x tiles of an SM, all waves
//
// There is one phase, but for stream-K: its whole tiles are one, its ranges another, in which memory and work overlap for themselves.
// A launch with a low-rank correction is a kernel of its own and has constants of its own. Two of them are `behind`, where the blocks that
// project come behind the others, and `late`, where they come in front and some of the others must wait for their places: it takes so much
// longer, whatever k is.
// A wave's turns take a latency and, for every block that an SM holds, what it keeps the SM busy. p lies between max (infinity) and sum (1)
// of the three. A kernel that fills more than half of the places for blocks keeps its successor from starting early. The constants are
// microseconds of an H100 and an H200; on other GPUs they rank plans, they do not predict times.
#include "plan/cost.h"

#include <algorithm>
#include <cmath>

#include "plan/cost_table.h"
#include "plan/low_rank.h"
#include "plan/smem.h"
#include "plan/smem_decode.h"
#include "plan/smem_sm90.h"
#include "plan/stream_k.h"

namespace sparse_marlin {
namespace {

constexpr double kL2BytesPerUsSm = 60e3;
constexpr double kReduceBytesPerUsSm = 75e3;
constexpr double kReached = 0.93;  // of the peak of the memory's bandwidth
constexpr double kL2Kept = 0.4;    // of it; both halves of an H100's keep what all SMs read
constexpr int kRaster = 8;         // device/scheduler.cuh

double dram_bytes_per_us_sm(const Device& device) {
  if (device.dram_gb_per_s > 0) return kReached * device.dram_gb_per_s * 1e3 / device.num_sms;
  switch (device.compute_capability) {
    case 80: return 18e3;  // A100
    case 86:
    case 89: return 8e3;     // GDDR6
    case 90: return 23.6e3;  // H100
    default: return device.compute_capability >= 120 ? 10e3 : 50e3;
  }
}

// Clusters of `size` blocks that run at once where an SM holds one block. An H100 or H200 has 132 SMs, in groups of 16 or 18 of which
// some miss one (docs/KERNEL_SM90.md).
int resident_clusters(const Device& device, int size) {
  constexpr int kSms = 132;
  constexpr int kResident[kMaxCluster] = {132, 66, 39, 30, 22, 17, 15, 15};
  return std::max(1, kResident[size - 1] * device.num_sms / kSms);
}

// Blocks an SM holds at once.
int blocks_per_sm(const Device& device, const Plan& plan) {
  if (family(plan.tile) != Family::kSm80) return blocks(plan.tile);
  const Tile& tile = kTiles[plan.tile];
  const int by_smem = device.smem_per_sm / (plan.smem_bytes + kSmemPerBlock);
  const bool few_threads = device.compute_capability == 86 || device.compute_capability == 89;
  const int by_threads = (few_threads ? 1536 : 2048) / tile.threads();
  return std::max(1, std::min({by_smem, by_threads, tile.min_blocks}));
}

// Column tiles that a block works on at the same time: its teams or warps along k.
int cols_at_once(int tile) {
  switch (family(tile)) {
    case Family::kSm80: return kTiles[tile].warps_k;
    case Family::kSm90: return tile_sm90(tile).size().teams;
    default: return tile_decode(tile).warps_k;
  }
}

double ceil_div(double a, double b) { return std::ceil(a / b); }

// All blocks at once, each with its whole tiles and then its range.
void stream(Effort& e, const Plan& plan, double tiles, double col_tiles, double sms) {
  const double blocks = static_cast<double>(plan.grid), blocks_an_sm = -plan.splits;
  const double rounds = tiles > blocks ? std::floor(tiles / blocks) - 1 : 0;
  const double range = (tiles - rounds * blocks) * col_tiles / blocks;
  e.turns = rounds * col_tiles;
  e.range_turns = std::ceil(range);
  e.full_waves = 0;
  e.last_wave = blocks_an_sm;
  e.crowding = std::clamp(2 * blocks / (sms * e.resident) - 1, 0.0, 1.0);
  e.parts = std::ceil(col_tiles / range);
  const bool even = tiles < blocks && std::fmod(blocks, tiles) == 0;  // no range crosses the end of a tile
  e.tiles = rounds * blocks_an_sm;
  e.range_tiles = (even ? 1 : std::ceil(range / col_tiles) + 1) * blocks_an_sm;
  e.streams = 1;
}

// Bytes that stream-K reads from memory again. Otherwise blocks that have the same tokens or features read the same column tiles at
// the same time; these are at different ones, so that only what L2 keeps as a whole is read once: activations first, which all blocks read,
// then weights, which neighbours read, the less of them at different times the nearer a range is to whole tiles.
double read_again(const Device& device, const Plan& plan, double tiles_m, double tiles_n, double tile_acts,
                  double tile_weights) {
  const double tiles = tiles_m * tiles_n, blocks = static_cast<double>(plan.grid);
  const double streamed = tiles > blocks ? tiles - (std::floor(tiles / blocks) - 1) * blocks : tiles;
  const double acts = std::min(tiles_m, ceil_div(streamed, tiles_n * kRaster) * kRaster) * tile_acts;
  const double weights = std::min(tiles_n, streamed) * tile_weights;
  const double apart = tiles_m > 1 ? 2 * std::abs(streamed / blocks - std::round(streamed / blocks)) : 0;
  const double kept = kL2Kept * static_cast<double>(device.l2_bytes);
  const auto missed = [](double bytes, double room) { return bytes > room ? 1 - std::max(0.0, room) / bytes : 0; };
  return missed(acts, kept) * std::max(0.0, streamed * tile_acts - acts) +
         missed(apart * weights, kept - acts) * std::max(0.0, streamed * tile_weights - weights);
}

double up_bytes_of_feature(const Problem& problem, const Plan& plan) {
  if (plan.tail == 0) return plan.rank * kActBytes;
  return plan.tail * static_cast<double>(format::tile_bytes(problem.num_bits)) / format::kTileRows +
         tail_groups(plan.tail, problem.group_size) * kActBytes;
}

double pow_sum(double work, double dram_us, double l2_us, double power) {
  return std::pow(std::pow(work, power) + std::pow(dram_us, power) + std::pow(l2_us, power), 1 / power);
}

}  // namespace

Effort effort(const Problem& problem, const Device& device, const Plan& plan) {
  const double m = std::max(1.0, static_cast<double>(problem.m)), sms = device.num_sms;
  const double tiles_m = ceil_div(m, block_m(plan.tile)),
               tiles_n = ceil_div(static_cast<double>(problem.n), tile_n(plan.tile));
  const double col_tiles = static_cast<double>(format::col_tiles(problem.k));
  const bool portable = family(plan.tile) == Family::kSm80;
  const int splits = std::max(1, plan.splits);
  const int cluster = portable ? 1 : share(plan.tile) * splits;
  // Blocks or clusters. Those that project a correction take places of the first wave, unless they come behind. They end soon: where some
  // of the others must wait for their places, that is no wave of its own.
  const double multiply = tiles_m * tiles_n * (portable ? splits : 1);
  const double project = static_cast<double>(plan.project_blocks) / splits;
  const double at_once = portable ? sms : resident_clusters(device, cluster);
  const double places = at_once * blocks_per_sm(device, plan);
  const bool wait_for_places = !plan.behind && multiply <= places && multiply + project > places;
  const double groups = plan.behind ? multiply : wait_for_places ? places : multiply + project;

  Effort e;
  e.turns = ceil_div(ceil_div(col_tiles, splits), cols_at_once(plan.tile));
  e.resident = blocks_per_sm(device, plan);
  e.full_waves = std::floor(groups / places);
  e.last_wave = std::ceil((groups - e.full_waves * places) / at_once);
  e.crowding = std::clamp(2 * groups / places - 1, 0.0, 1.0);
  e.tiles = e.full_waves * e.resident + e.last_wave;
  if (plan.splits < 0) stream(e, plan, groups, col_tiles, sms);

  e.behind = plan.behind ? 1 : 0;
  e.late = wait_for_places ? 1 : 0;
  if (plan.splits > 1) e.exchanges = portable ? 1 : e.full_waves + (e.last_wave > 0);

  const double weights =
      static_cast<double>(format::tile_bytes(problem.num_bits)) * format::row_tiles(problem.n) * col_tiles;
  const double acts = m * problem.k * kActBytes, out = m * problem.n * kActBytes;
  const double block_weights = weights / format::row_tiles(problem.n) * block_n(plan.tile) / format::kTileRows;
  const double block_acts = acts / m * std::min<double>(m, block_m(plan.tile));
  const double again = plan.splits < 0 ? read_again(device, plan, tiles_m, tiles_n, block_acts, block_weights) : 0;
  // Of a correction; what the wgmma.sp kernel adds is columns of the problem.
  const bool projects = plan.project_blocks > 0;
  const double up_row = up_bytes_of_feature(problem, plan);
  const double factors = projects ? plan.rank * problem.k * double{kActBytes} + up_row * problem.n : 0;
  const double bandwidth = dram_bytes_per_us_sm(device) * sms, whole = e.turns / (e.turns + e.range_turns);
  e.dram_us = whole * (weights + acts + out + factors) / bandwidth;
  e.range_dram_us = ((1 - whole) * (weights + acts + out) + again) / bandwidth;
  // of a tile's k, of an SM
  const double shares = plan.splits < 0 ? e.last_wave * e.turns / col_tiles : e.tiles / splits;
  e.l2_us = shares * (block_weights + block_acts / share(plan.tile)) / kL2BytesPerUsSm;
  e.range_l2_us = e.last_wave * e.range_turns / col_tiles * (block_weights + block_acts) / kL2BytesPerUsSm;
  // Rows of `up` for every tile, of which one block of a cluster adds the correction, and t for every block.
  if (projects) {
    const double up = e.tiles / splits * tile_n(plan.tile) * up_row;
    const double t = (e.full_waves > 0 ? e.resident : e.last_wave) *
                     static_cast<double>(num_packets(problem.m, plan.rank) * kPacketBytes);
    e.l2_us += (up + t) / kL2BytesPerUsSm;
  }
  if (portable && plan.splits > 1)
    e.reduce_us = 2 * m * problem.n * sizeof(float) * plan.splits / (kReduceBytesPerUsSm * sms);
  return e;
}

double predicted_us(const Problem& problem, const Device& device, const Plan& plan) {
  const Effort e = effort(problem, device, plan);
  const TileCost& c = plan.project_blocks > 0 ? kLowRankCosts[tile_decode_index(plan.tile)] : kTileCosts[plan.tile];
  double turn = e.full_waves * (c.turn + c.turn_block * e.resident);
  if (e.last_wave > 0) turn += c.turn + c.turn_block * e.last_wave;
  const double whole = pow_sum(e.turns * turn + c.tile * e.tiles, c.dram * e.dram_us, c.l2 * e.l2_us, c.power);
  const double range =
      pow_sum(e.range_turns * turn + c.tile * e.range_tiles, c.dram * e.range_dram_us, c.l2 * e.range_l2_us, c.power);
  const double exchange = e.exchanges * (c.exchange + c.exchange_split * plan.splits) +
                          e.streams * (c.stream + c.stream_part * e.parts) + e.reduce_us;
  return c.launch + c.behind * e.behind + c.late * e.late + c.crowding * e.crowding + whole + range + exchange;
}

}  // namespace sparse_marlin
