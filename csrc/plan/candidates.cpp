// Enumerate, reject with a reason, score.
#include "plan/candidates.h"

#include <algorithm>

#include "plan/cost.h"
#include "plan/registers.h"
#include "plan/smem.h"
#include "plan/smem_decode.h"
#include "plan/smem_sm90.h"
#include "plan/stream_k.h"
#include "plan/tiles_all.h"
#include "plan/workspace.h"

namespace sparse_marlin {
namespace {

constexpr int kHopper = 90;
constexpr int64_t kMaxGrid = 2147483647;
constexpr int64_t kMaxWorkspaceBytes = int64_t{1} << 30;
// What plan() tries; plan_with_tile takes any up to its kMaxSplits. In the kernels for Hopper the splits are blocks of a cluster.
constexpr int kSplitsSm80[] = {1, 2, 3, 4, 6, 8, 12, 16};
constexpr int kSplitsSm90[] = {-1, -2, 1, 2, 3, 4, 5, 6, 7, 8};
constexpr int kSplitsDecode[] = {1, 2, 3, 4, 6, 8};
// Stream-K: of more rounds the last one is less than a fifth, and what blocks at different column tiles read again costs as much.
constexpr int kMaxStreamRounds = 4;
constexpr int kEnoughBlocks = 8;  // blocks an SM, beyond which splitting k can only cost

void build_sm80(Candidate& c, const Problem& problem, const Device& device, int splits) {
  Plan& p = c.plan;
  const Tile& tile = kTiles[p.tile];
  p.threads = tile.threads();
  const int64_t col_tiles = format::col_tiles(problem.k);
  const int64_t tiles_m = (problem.m + tile.block_m - 1) / tile.block_m;
  const int64_t tiles_n = (problem.n + tile.block_n - 1) / tile.block_n;
  p.grid = tiles_m * tiles_n * splits;
  if (p.grid > kMaxGrid) {
    c.rejected = "grid of " + std::to_string(p.grid) + " blocks";
    return;
  }
  p.workspace_bytes = workspace(problem, split_bytes(problem, splits)).size;
  if (splits > 1 && p.workspace_bytes > kMaxWorkspaceBytes) {
    c.rejected = "workspace of " + std::to_string(p.workspace_bytes >> 20) + " MiB";
    return;
  }
  const int rows = act_rows(tile, problem.m);
  const int64_t turns = ((col_tiles + splits - 1) / splits + tile.warps_k - 1) / tile.warps_k;
  // one stage more than there are tiles to bring never helps
  const int wanted = static_cast<int>(std::clamp<int64_t>(turns + 1, kMinStages, kMaxStages));
  for (int stages = wanted; stages >= kMinStages; --stages) {
    const int bytes = smem_bytes(tile, problem.num_bits, rows, problem.group_size, stages);
    // leave room for the blocks the register budget allows, if two stages still fit
    const int room = std::min(device.smem_per_block, device.smem_per_sm / tile.min_blocks - kSmemPerBlock);
    if (bytes <= (stages == kMinStages ? device.smem_per_block : room)) {
      p.num_stages = stages;
      p.smem_bytes = bytes;
      break;
    }
  }
  if (p.num_stages == 0) {
    const int bytes = smem_bytes(tile, problem.num_bits, rows, problem.group_size, kMinStages);
    c.rejected =
        "needs " + std::to_string(bytes) + " B of shared memory, a block has " + std::to_string(device.smem_per_block);
    return;
  }
  p.predicted_us = predicted_us(problem, device, p);
}

void build_stream_k(Candidate& c, const Problem& problem, const Device& device, const TileSm90& tile, int64_t tiles) {
  Plan& p = c.plan;
  const int blocks = -p.splits;
  if (blocks > tile.size().blocks()) {
    c.rejected = "stream-K with " + std::to_string(blocks) + " blocks an SM, which holds " +
                 std::to_string(tile.size().blocks());
    return;
  }
  if (tile.share > 1) {
    c.rejected = "no stream-K with blocks that share activations";
    return;
  }
  if (tile.size().teams > 1) {
    c.rejected = "no stream-K with teams";
    return;
  }
  if (tiles == 0) {
    c.rejected = "no output";
    return;
  }
  p.grid = stream_k_blocks(tiles, format::col_tiles(problem.k), int64_t{device.num_sms} * blocks);
  if (tiles % p.grid == 0) {
    c.rejected = "every block has as many whole tiles";
    return;
  }
  if (tiles > kMaxStreamRounds * p.grid) {
    c.rejected = "more than " + std::to_string(kMaxStreamRounds) + " rounds of whole tiles";
    return;
  }
  p.workspace_bytes = workspace(problem, stream_bytes(tile.size(), p.grid)).size;
  p.predicted_us = predicted_us(problem, device, p);
}

// The product's last column tiles are those of a packed second factor; only the copies that bring them know (device/producer_sm90.cuh).
Problem with_tail(Problem problem, int tail) {
  if (tail > 0) problem.k = (format::col_tiles(problem.k) + tail) * format::kTileCols;
  return problem;
}

void build_sm90(Candidate& c, const Problem& without, const Device& device, int splits, const Correction& correction) {
  Plan& p = c.plan;
  p.rank = correction.rank;
  p.tail = correction.tail();
  const Problem problem = with_tail(without, p.tail);
  const TileSm90 tile = tile_sm90(p.tile);
  const ShapeSm90& shape = tile.size();
  const SmemSm90 smem = smem_sm90(shape, problem.num_bits, scale_mode(problem.group_size));
  p.threads = shape.threads();
  p.workspace_bytes = workspace(problem, 0).size;  // splits meet in shared memory
  p.num_stages = smem.stages;
  p.smem_bytes = smem.size;
  const int64_t tiles =
      ((problem.m + shape.block_m - 1) / shape.block_m) * ((problem.n + tile_n(p.tile) - 1) / tile_n(p.tile));
  if (splits < 0) {
    build_stream_k(c, problem, device, tile, tiles);
    return;
  }
  const int cluster = tile.share * splits;
  if (cluster > kMaxCluster) {
    c.rejected = "a cluster of " + std::to_string(cluster) + " blocks, at most " + std::to_string(kMaxCluster);
    return;
  }
  if (splits > 1 && !shape.may_split()) {
    c.rejected = "does not split k";
    return;
  }
  if (splits > 1 && tile.share > 1) {
    c.rejected = "blocks that share activations do not split k";
    return;
  }
  if (splits > 1 && exchange_bytes(shape, splits) > smem.staging) {
    c.rejected = "no room to exchange the sums of " + std::to_string(splits) + " splits";
    return;
  }
  if (format::col_tiles(problem.k) / splits < shape.teams) {
    c.rejected = "a team without a column tile";
    return;
  }
  // A cluster walks over tiles. With splits it does one, since the exchange takes the place of the stages, and so do teams.
  const bool one = splits > 1 || shape.teams > 1;
  const int64_t clusters = one ? tiles : std::min<int64_t>(tiles, device.num_sms * shape.blocks() / cluster);
  p.grid = clusters * cluster;
  if (p.grid > kMaxGrid) {
    c.rejected = "grid of " + std::to_string(p.grid) + " blocks";
    return;
  }
  p.predicted_us = predicted_us(problem, device, p);
}

void build_decode(Candidate& c, const Problem& problem, const Device& device, int splits,
                  const Correction& correction) {
  Plan& p = c.plan;
  const TileDecode& tile = tile_decode(p.tile);
  if (splits > kMaxSplitsDecode) {
    c.rejected = "a cluster of " + std::to_string(splits) + " blocks, at most " + std::to_string(kMaxSplitsDecode);
    return;
  }
  const int64_t tiles = tiles_decode(problem, tile), most = int64_t{device.num_sms} * tile.blocks;
  if (splits > 1 && tiles * splits > most) {
    c.rejected = "splits only where all blocks run at once";
    return;
  }
  if (tiles * ((problem.m + tile.block_m - 1) / tile.block_m) > kMostTilesDecode) {
    c.rejected = "too many output tiles";
    return;
  }
  if (problem.k % kDecodeColMultiple != 0) {
    c.rejected = "needs in features that are a multiple of " + std::to_string(kDecodeColMultiple);
    return;
  }
  const int rank = correction.rank;
  const SmemDecode smem = decode_layout(problem, tile, splits, device.num_sms, device.smem_per_sm, correction);
  if (smem.stages == 0) {
    c.rejected = "no room for its stages";
    return;
  }
  p.threads = tile.threads();
  p.workspace_bytes = workspace(problem, 0).size;
  p.num_stages = smem.stages;
  p.smem_bytes = smem.size;
  p.grid = splits > 1 ? tiles * splits : std::min(tiles, most);
  if (rank > 0) {
    p.rank = rank;
    p.tail = correction.tail();
    const int groups = project_groups(problem.m, rank, tile);
    p.shares = project_shares(groups, problem.k, p.grid, device.num_sms, tile);
    p.project_blocks = project_blocks(groups, p.shares, splits);
    const int places = blocks_decode(tile, problem.num_bits, scale_mode(problem.group_size), true);
    p.behind = project_behind(problem.k, tiles * splits, p.project_blocks, device.num_sms, places);
    // Blocks that walk leave room for these, unless that makes a turn more: those that come later ask late for their weights.
    const auto turns = [tiles](int64_t blocks) { return (tiles + blocks - 1) / blocks; };
    if (splits == 1 && p.project_blocks < most && turns(most - p.project_blocks) == turns(most))
      p.grid = std::min(tiles, most - p.project_blocks);
    p.grid += p.project_blocks;
    p.workspace_bytes += low_rank_workspace_bytes(problem.m, rank, p.shares);
  }
  p.predicted_us = predicted_us(problem, device, p);
}

// Why the kernel of a tile does not add such a correction, whatever the tile, or empty.
std::string why_no_correction(const Problem& problem, int tile, const Correction& correction) {
  const int rank = correction.rank;
  if (rank < 1 || rank % kProjectRanks != 0 || rank > kMaxRankPacked)
    return "a rank that is a multiple of " + std::to_string(kProjectRanks) + " up to " +
           std::to_string(kMaxRankPacked) + ", got " + std::to_string(rank);
  if (correction.packed && problem.group_size == kChannelwise)
    return "a group size above 0 where the second factor is packed";
  if (correction.packed && problem.n % kRowElements != 0)
    return "out features that are a multiple of " + std::to_string(kRowElements) +
           " where the second factor is packed, got " + std::to_string(problem.n);
  if (family(tile) == Family::kDecode) {
    if (rank > kMaxRank) return "a rank of at most " + std::to_string(kMaxRank) + ", got " + std::to_string(rank);
    if (problem.m > kMaxTokensLowRank)
      return "at most " + std::to_string(kMaxTokensLowRank) + " tokens, got " + std::to_string(problem.m);
    return {};
  }
  if (family(tile) == Family::kSm80) return "a tile of another kernel, since this one adds none";
  if (!correction.packed) return "a packed second factor";
  if (problem.k % kRowElements != 0)
    return "in features that are a multiple of " + std::to_string(kRowElements) + ", got " + std::to_string(problem.k);
  return {};
}

}  // namespace

std::span<const int> splits_of(int tile) {
  switch (family(tile)) {
    case Family::kSm80: return kSplitsSm80;
    case Family::kSm90: return kSplitsSm90;
    default: return kSplitsDecode;
  }
}

bool may_share(const Problem& problem, const Device& device, int tile) {
  // where blocks cannot share at all, that is why such a tile is rejected
  if (share(tile) == 1 || device.compute_capability != kHopper || problem.m > kTokensShared) return true;
  const int64_t tiles_m = (problem.m + block_m(tile) - 1) / block_m(tile);
  const int64_t tiles_n = (problem.n + tile_n(tile) - 1) / tile_n(tile) * share(tile);
  const int64_t rounds = (tiles_m * tiles_n + device.num_sms - 1) / device.num_sms;
  return problem.m > kTokensAlone && rounds * format::col_tiles(problem.k) > kColsAlone;
}

Candidate build(const Problem& problem, const Device& device, int tile, int splits, const Correction& correction) {
  Candidate c;
  c.plan.tile = tile;
  c.plan.splits = splits;
  const int64_t col_tiles = format::col_tiles(problem.k);
  if (correction.rank != 0) {
    const std::string expected = why_no_correction(problem, tile, correction);
    if (!expected.empty()) {
      c.rejected = "low-rank correction: expected " + expected;
      return c;
    }
  }
  if (splits > col_tiles) {
    c.rejected = "more splits than 128-column tiles (" + std::to_string(col_tiles) + ")";
    return c;
  }
  if (family(tile) != Family::kSm80 && device.compute_capability != kHopper) {
    c.rejected = "needs compute capability 9.0";
    return c;
  }
  if (family(tile) != Family::kSm80 && !device.hopper_kernels) {
    c.rejected = "needs a build with native code for 9.0a (TORCH_CUDA_ARCH_LIST)";
    return c;
  }
  switch (family(tile)) {
    case Family::kSm80: build_sm80(c, problem, device, splits); break;
    case Family::kSm90: build_sm90(c, problem, device, splits, correction); break;
    case Family::kDecode: build_decode(c, problem, device, splits, correction); break;
  }
  c.plan.spread = device.compute_capability == kHopper && c.plan.project_blocks == 0 && c.plan.grid <= device.num_sms;
  return c;
}

std::vector<Candidate> candidates(const Problem& problem, const Device& device, const Correction& correction) {
  std::vector<Candidate> all;
  for (int tile = 0; tile < kNumTiles; ++tile) {
    if (share(tile) > 1 && !may_share(problem, device, tile)) {
      Candidate& left_out = all.emplace_back();
      left_out.plan.tile = tile;
      left_out.rejected = "activations are not shared by blocks with so little to do";
      continue;
    }
    const int64_t blocks =
        ((problem.m + block_m(tile) - 1) / block_m(tile)) * ((problem.n + block_n(tile) - 1) / block_n(tile));
    for (int splits : splits_of(tile)) {
      all.push_back(build(problem, device, tile, splits, correction));
      if (splits > 0 && (!all.back().rejected.empty() || blocks * splits > int64_t{kEnoughBlocks} * device.num_sms))
        break;
    }
  }
  return all;
}

}  // namespace sparse_marlin
