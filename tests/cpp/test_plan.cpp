// The pieces below the planner that only C++ sees: the blocks' share of the work, shared-memory and workspace arithmetic.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <tuple>

#include "device/scheduler.cuh"
#include "launch/spread.h"
#include "plan/plan.h"
#include "plan/project.h"
#include "plan/smem.h"
#include "plan/smem_decode.h"
#include "plan/stream_k.h"
#include "plan/workspace.h"

namespace sparse_marlin {
namespace {

// Every (output tile, column tile) belongs to exactly one block.
TEST(Scheduler, SharesOutAllWorkOnce) {
  for (int tiles_m : {1, 2, 7, 8, 9, 20}) {
    for (int tiles_n : {1, 3, 16}) {
      for (int splits : {1, 2, 3, 5}) {
        for (int col_tiles : {5, 32}) {
          std::set<std::tuple<int, int, int>> seen;
          for (int block = 0; block < tiles_m * tiles_n * splits; ++block) {
            const device::BlockWork w = device::block_work(block, tiles_m, tiles_n, splits, col_tiles);
            ASSERT_GE(w.tile_m, 0);
            ASSERT_LT(w.tile_m, tiles_m);
            ASSERT_LT(w.tile_n, tiles_n);
            ASSERT_LT(w.first_col, w.last_col) << "a share is never empty";
            for (int col = w.first_col; col < w.last_col; ++col) {
              ASSERT_TRUE(seen.emplace(w.tile_m, w.tile_n, col).second) << "computed twice";
            }
          }
          EXPECT_EQ(seen.size(), static_cast<size_t>(tiles_m) * tiles_n * col_tiles);
        }
      }
    }
  }
}

// Without divisions, the same.
TEST(Scheduler, TileOrderIsThatOfBlockWork) {
  for (int tiles_m : {1, 2, 7, 8, 9, 15, 16, 20, 1000}) {
    for (int tiles_n : {1, 3, 16, 3584}) {
      for (int splits : {1, 2, 3, 5, 6, 7, 8}) {
        const int cols = 8 + 3 * splits;
        const device::TileOrder order = device::TileOrder::of(tiles_m, tiles_n, splits, cols);
        const int tiles = tiles_m * tiles_n;
        for (int tile = 0; tile < tiles; tile += 1 + tiles / 5000) {
          for (int split = 0; split < splits; ++split) {
            const device::BlockWork w = order.work(tile, split),
                                    want = device::block_work(tile * splits + split, tiles_m, tiles_n, splits, cols);
            ASSERT_EQ(w.tile_m, want.tile_m) << tile << " of " << tiles_m << " x " << tiles_n;
            ASSERT_EQ(w.tile_n, want.tile_n);
            ASSERT_EQ(w.split, want.split);
            ASSERT_EQ(w.first_col, want.first_col) << "split " << split << " of " << splits;
            ASSERT_EQ(w.last_col, want.last_col);
          }
        }
      }
    }
  }
}

TEST(Scheduler, SplitsOfLongK) {
  for (int splits = 2; splits <= kMaxCluster; ++splits) {
    for (int cols : {splits, 1000, 131071, 131072}) {  // k up to 2^24
      const device::TileOrder order = device::TileOrder::of(1, 1, splits, cols);
      for (int split = 0; split < splits; ++split) {
        const device::BlockWork w = order.work(0, split), want = device::block_work(split, 1, 1, splits, cols);
        ASSERT_EQ(w.first_col, want.first_col);
        ASSERT_EQ(w.last_col, want.last_col);
      }
    }
  }
}

TEST(Scheduler, DivisorIsExact) {
  for (uint32_t divisor : {1u, 2u, 3u, 7u, 32u, 112u, 448u, 65535u, 65536u, 131071u, 2147483647u}) {
    const device::Divisor d = device::Divisor::by(divisor);
    for (uint32_t at : {0u, divisor, 1000u * 448u, 1u << 30, 2147483647u}) {
      for (int64_t n = std::max<int64_t>(0, int64_t{at} - 3); n <= std::min<int64_t>(INT32_MAX, int64_t{at} + 3); ++n)
        ASSERT_EQ(d.divide(static_cast<int>(n)), n / divisor) << n << " / " << divisor;
    }
  }
}

// The same for the decode kernel, where each tile has all of k.
TEST(Scheduler, NeighboursShareFeatures) {
  for (int tiles_m : {1, 2, 3, 7, 8, 16, 1000}) {
    for (int tiles_n : {1, 3, 192, 3584}) {
      std::set<std::pair<int, int>> seen;
      int tile_n = 0;
      for (int tile = 0; tile < tiles_m * tiles_n; ++tile) {
        const device::BlockWork w = device::work_of_neighbours(tile, tiles_m, device::inverse(tiles_m), 5);
        ASSERT_EQ(w.tile_n, tile / tiles_m);
        ASSERT_EQ(w.tile_m, tile % tiles_m);
        ASSERT_GE(w.tile_n, tile_n) << "features are read in turn";
        tile_n = w.tile_n;
        ASSERT_TRUE(seen.emplace(w.tile_m, w.tile_n).second) << "computed twice";
        ASSERT_EQ(w.first_col, 0);
        ASSERT_EQ(w.last_col, 5);
      }
    }
  }
}

TEST(Scheduler, DividesExactlyUpToTheLimitOfThePlanner) {
  for (int64_t divisor : {2, 3, 5, 7, 63, 64, 65, 2047, 2048, 40503, 65535, 65536}) {
    const int64_t most = std::min<int64_t>(kMostTilesDecode / divisor, INT32_MAX);
    for (int64_t at : {int64_t{0}, divisor, most / 2, most}) {
      for (int64_t tile = std::max<int64_t>(0, at - 2 * divisor); tile <= std::min(most, at + 2 * divisor); ++tile) {
        const device::BlockWork w = device::work_of_neighbours(static_cast<int>(tile), static_cast<int>(divisor),
                                                               device::inverse(static_cast<int>(divisor)), 1);
        ASSERT_EQ(w.tile_n, tile / divisor) << tile << " / " << divisor;
        ASSERT_EQ(w.tile_m, tile % divisor) << tile << " % " << divisor;
      }
    }
  }
}

// The ranges of stream-K are of nearly the same length and cover what is not done whole.
TEST(StreamK, RangesCoverTheColumnTilesOnce) {
  for (int64_t tiles : {1, 2, 7, 32, 112, 133, 500, 20000}) {
    for (int64_t cols : {3, 32, 112, 131072}) {
      for (int64_t most : {1, 5, 132, 264}) {
        const int64_t blocks = stream_k_blocks(tiles, cols, most);
        ASSERT_GE(blocks, 1);
        ASSERT_LE(blocks, most);
        if ((tiles + blocks) * cols > INT32_MAX) continue;
        const StreamK s = stream_k(tiles, cols, blocks);
        EXPECT_EQ(s.step == 0, tiles % blocks == 0);
        if (s.step == 0) continue;
        EXPECT_EQ(s.whole_tiles % blocks, 0);
        const int64_t streamed = (tiles - s.whole_tiles) * cols;
        EXPECT_EQ(s.start(0), 0);
        ASSERT_EQ(s.start(static_cast<int>(blocks)), streamed);
        for (int range = 0; range < blocks; ++range) {
          const int64_t length = s.start(range + 1) - s.start(range);
          ASSERT_GE(length, streamed / blocks);
          ASSERT_LE(length, streamed / blocks + 1);
          ASSERT_GE(length, 1) << "a range is never empty";
        }
      }
    }
  }
}

TEST(Smem, StagesKeepTheAlignmentThatSwizzledAddressesNeed) {
  for (const Tile& tile : kTiles) {
    for (int bits : {4, 8}) {
      for (int group : kGroupSizes) {
        for (int rows : {1, 5, 8, tile.block_m}) {
          EXPECT_EQ(stage_bytes(tile, bits, rows, group) % kActRowBytes, 0);
          EXPECT_EQ(weight_stage_bytes(tile, bits) % kActRowBytes, 0);
          EXPECT_GE(smem_bytes(tile, bits, rows, group, kMinStages), epilogue_bytes(tile));
        }
      }
    }
  }
}

// Launches in a row that lie one block on an SM: no second block of the same launch fits beside one, but one of the next launch does.
TEST(Spread, KeepsBlocksOfALaunchApartAndTheNextLaunchBesideThem) {
  Device device;
  device.smem_per_sm = 228 << 10;
  Plan plan;
  plan.spread = true;
  plan.smem_bytes = smem_beside(device.smem_per_sm, 2);
  for (int warps : {9, 13}) {
    for (int registers = 64; registers <= 128; registers += 8) {
      const int fit = 4 * (16384 / (registers * 32));  // warps, of four schedulers
      const auto beside = [&](const BlockSize& a, const BlockSize& b) {
        return a.smem_bytes + b.smem_bytes + 2 * kSmemPerBlock <= device.smem_per_sm &&
               a.threads + b.threads <= fit * 32;
      };
      plan.threads = warps * 32;
      const BlockSize sizes[] = {block_size(plan, device, registers), block_size(plan, device, registers)};
      for (const BlockSize& size : sizes) EXPECT_FALSE(beside(size, size)) << warps << " warps, " << registers;
      const BlockSize unspread{plan.threads, plan.smem_bytes};
      if (beside(unspread, unspread) && 2 * warps + 2 <= fit) {
        EXPECT_TRUE(beside(sizes[0], sizes[1])) << warps << " warps, " << registers;
      }
    }
  }
  plan.spread = false;
  EXPECT_EQ(block_size(plan, device, 72).smem_bytes, plan.smem_bytes);
  EXPECT_EQ(block_size(plan, device, 72).threads, plan.threads);
}

TEST(Workspace, HoldsPartialsAndAlignedCopiesSideBySide) {
  Problem p;
  p.m = 3;
  p.n = 65;
  p.k = 36;
  p.group_size = 32;
  const Workspace w = workspace(p, split_bytes(p, 2));
  EXPECT_GE(w.acts, 2 * 3 * 65 * 4);
  EXPECT_GE(w.scales - w.acts, 3 * 40 * kActBytes) << "rows of 36 become rows of 40";
  EXPECT_GE(w.size - w.scales, 2 * 72 * kActBytes) << "two groups of 65 become rows of 72";
  EXPECT_EQ(w.acts % kWorkspaceAlign, 0);
  EXPECT_EQ(w.scales % kWorkspaceAlign, 0);
  p.n = 64;
  p.k = 64;
  EXPECT_EQ(workspace(p, split_bytes(p, 1)).size, 0);
}

TEST(Plan, RefusesWhatTheDeviceCannotDo) {
  const Device turing{75, 68, 64 * 1024, 64 * 1024, 4 << 20};
  Problem p;
  p.m = p.n = p.k = 64;
  EXPECT_NE(why_unsupported(p, turing).find("got 7.5"), std::string::npos);
  EXPECT_THROW(plan(p, turing), std::invalid_argument);
}

// device/kernel_project.cuh: what its blocks share out is all of the product, once.
TEST(Project, EveryPlan) {
  constexpr int kSms = 132;
  for (int64_t m : {1, 17, 32, 33, 64, 65, 100, 129, 1000, 4096}) {
    for (int64_t k : {8, 64, 136, 1096, 4096, 14336}) {
      for (int rank : {8, 24, 64, 72, 192}) {
        SCOPED_TRACE(testing::Message() << m << " tokens, k " << k << ", rank " << rank);
        const ProjectPlan plan = project_plan(m, k, rank, kSms);
        const ProjectShape& shape = kProjectShapes[static_cast<size_t>(plan.shape)];
        const int64_t token_tiles = (m + shape.tokens() - 1) / shape.tokens();
        EXPECT_EQ(plan.grid, token_tiles * plan.rank_tiles * plan.shares);
        EXPECT_GE(plan.rank_tiles * shape.ranks(), rank);
        EXPECT_LT((plan.rank_tiles - 1) * shape.ranks(), rank);
        EXPECT_TRUE(plan.shares == 1 || plan.shares == 2 || plan.shares == 4 || plan.shares == 8);
        // a share of k for every warp, and no more blocks than two an SM where k is shared out
        const int64_t units = (k + shape.unit_cols() - 1) / shape.unit_cols();
        EXPECT_TRUE(plan.shares == 1 || (units >= plan.shares * shape.warps_k && plan.grid <= 2 * kSms));
        EXPECT_EQ(shape.has_ring(), m > kFewTokensProject);
      }
    }
  }
}

}  // namespace
}  // namespace sparse_marlin
