// The decode kernel, block for block on the CPU (lanes.h), against sums over the codes in float64: every tile, every way of scaling,
// both types, k split over clusters, with and without a low-rank correction; sizes that fill neither tiles nor turns, and so few SMs that
// blocks walk.
#include <gtest/gtest.h>

#include "device/kernel_decode.cuh"
#include "format/problem.h"
#include "plan/low_rank.h"
#include "plan/smem_decode.h"
#include "support.h"

namespace sparse_marlin {
namespace {

using device::KernelArgsDecode;

constexpr int kSmemPerSm = 228 << 10;
constexpr int kRank = 64;

template <typename Act>
struct Values {
  std::vector<Act> all;
  explicit Values(int64_t count) : all(static_cast<size_t>(count) + 8) {}
  Act* data() {  // at a multiple of 16 bytes
    return reinterpret_cast<Act*>((reinterpret_cast<uintptr_t>(all.data()) + 15) / 16 * 16);
  }
  template <typename Draw>
  Values& fill(int64_t count, Draw draw, float factor = 1) {
    for (int64_t i = 0; i < count; ++i) data()[i] = Act(draw(emulated::random) * factor);
    return *this;
  }
  double operator[](int64_t i) { return static_cast<double>(static_cast<float>(data()[i])); }
};

CUtensorMap map_of(const emulated::TensorMap& map) {
  CUtensorMap raw;
  std::memcpy(static_cast<void*>(&raw), &map, sizeof(map));
  return raw;
}

template <typename Act, int kBits, int kTileIndex, ScaleMode kMode, bool kLowRank>
void expect_right(int m, int n, int k, int group_size, int num_sms, int splits = 1, bool packed_up = false,
                  int low_rank = kRank) {
  constexpr TileDecode kTile = kTilesDecode[kTileIndex];
  const bool half = std::is_same_v<Act, __half>;
  const int rank = kLowRank ? low_rank : 0;
  Problem problem;
  problem.m = m;
  problem.n = n;
  problem.k = k;
  problem.group_size = group_size;
  problem.num_bits = kBits;
  problem.dtype = half ? DType::kFloat16 : DType::kBFloat16;
  const SmemDecode smem = decode_layout(problem, kTile, splits, num_sms, kSmemPerSm, {rank, packed_up});
  if (smem.stages == 0) return;  // no plan has it
  SCOPED_TRACE(testing::Message() << "tile " << kTileIndex << ", " << m << " tokens, " << k << " -> " << n << ", group "
                                  << group_size << ", " << num_sms << " SMs, " << smem.stages << " stages, " << splits
                                  << " splits, rank " << rank << (packed_up ? ", packed" : ""));

  const std::vector<int8_t> codes = test::random_codes(n, k, kBits, static_cast<uint32_t>(emulated::random()));
  const test::Packed packed = test::pack_codes(codes, n, k, kBits);
  ASSERT_TRUE(packed.status.ok());
  Values<uint32_t> words(static_cast<int64_t>(packed.words.size()));
  std::copy(packed.words.begin(), packed.words.end(), words.data());
  const int groups = static_cast<int>(num_groups(k, group_size));
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> scale(0.01f, 0.1f);
  Values<Act> acts(int64_t{m} * k), scales(int64_t{groups} * n), bias(n), down(int64_t{rank} * k),
      up(int64_t{n} * rank), out(int64_t{m} * n);
  acts.fill(int64_t{m} * k, normal);
  scales.fill(int64_t{groups} * n, scale);
  bias.fill(n, normal);
  down.fill(int64_t{rank} * k, normal, 0.05f);
  up.fill(int64_t{n} * rank, normal, 0.5f);
  // A packed `up`: codes of its 128-column tiles, whose values take the place of the dense ones.
  const int tail = packed_up ? tail_tiles(rank) : 0, tail_k = tail * format::kTileCols;
  const int tail_rows = packed_up ? tail_groups(tail, group_size) : 0;
  Values<Act> up_scales(int64_t{tail_rows} * n);
  up_scales.fill(int64_t{tail_rows} * n, scale);
  std::vector<int8_t> up_codes(static_cast<size_t>(int64_t{n} * tail_k));
  std::uniform_int_distribution<int> draw_code(format::code_min(kBits), format::code_max(kBits));
  for (int j = 0; packed_up && j < n; ++j) {
    for (int r = 0; r < rank; ++r) {
      const int col = r / 64 * 128 + (r % 4 < 2 ? 0 : 64) + r % 64;
      const int drawn = draw_code(emulated::random);
      up_codes[static_cast<size_t>(int64_t{j} * tail_k + col)] = static_cast<int8_t>(drawn);
      up.data()[int64_t{j} * rank + r] = Act(static_cast<float>(drawn * up_scales[int64_t{col / group_size} * n + j]));
    }
  }
  const test::Packed up_packed = packed_up ? test::pack_codes(up_codes, n, tail_k, kBits) : test::Packed{};
  Values<uint32_t> up_words(static_cast<int64_t>(up_packed.words.size()));
  std::copy(up_packed.words.begin(), up_packed.words.end(), up_words.data());
  std::memset(static_cast<void*>(out.all.data()), 0x7f, out.all.size() * sizeof(Act));  // an element not written shows
  const int projected = project_groups(m, rank, kTile);
  const int shares = kLowRank ? project_shares(projected, k, tiles_decode(problem, kTile) * splits, 132, kTile) : 0;
  std::vector<uint64_t> workspace(kLowRank ? low_rank_workspace_bytes(m, rank, shares) / sizeof(uint64_t) + 64 : 1,
                                  0x55);

  // what launch/launch_decode.cu fills in
  KernelArgsDecode args{};
  args.gemm.params = {acts.data(), words.data(), packed.row_words(), scales.data(), bias.data(), out.data(), nullptr};
  args.gemm.m = m;
  args.gemm.n = n;
  args.gemm.k = k;
  args.gemm.tiles_m = (m + kTile.block_m - 1) / kTile.block_m;
  args.gemm.tiles_n = (n + kTile.block_n() - 1) / kTile.block_n();
  args.gemm.splits = splits;
  args.gemm.num_groups = groups;
  args.gemm.group_size = group_size;
  args.gemm.group_shift = group_size > 0 ? __builtin_ctz(group_size) : 0;
  args.smem = smem;
  args.splits_inverse = device::inverse(splits);
  args.start = {reinterpret_cast<const char*>(words.data()),
                0,
                static_cast<uint32_t>(packed.row_words() * format::kWordBytes / kCopyBytes),
                static_cast<int>(format::row_tiles(n)) - 1,
                args.gemm.tiles_m,
                device::inverse(args.gemm.tiles_m),
                args.gemm.tiles_m * args.gemm.tiles_n,
                static_cast<int>(format::col_tiles(k)),
                turns(kTile, k, splits),
                kTile.warps_k * splits,
                splits,
                smem.stages,
                smem.weights,
                smem.weights_full};
  args.acts_map = map_of({acts.data(),
                          {kHalfCols, m, k / kHalfCols},
                          {kActBytes, int64_t{k} * kActBytes, kSwizzleRowBytes},
                          {kHalfCols, smem.rows, kTile.warps_k * kHalves},
                          true});
  args.scales_map = map_of({scales.data(),
                            {n, groups, 1},
                            {kActBytes, int64_t{n} * kActBytes, 0},
                            {kTile.block_n(), chunk_scale_rows(kTile, group_size), 1},
                            false});
  args.next = {reinterpret_cast<const char*>(words.data()), static_cast<uint32_t>(emulated::random() % 4000 * 16)};
  ptx::prefetched.clear();
  int clusters = splits > 1 ? args.start.tiles : std::min(args.start.tiles, num_sms * kTile.blocks);
  if (kLowRank) {
    char* base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256);
    device::LowRankArgs& low = args.low;
    low.down = down.data();
    low.count = reinterpret_cast<uint32_t*>(base);
    low.packets = reinterpret_cast<ptx::Packet*>(base + kWorkspaceAlign);
    low.token = emulated::random() + (uint64_t{1} << 40);
    low.rank = rank;
    low.shares_log2 = std::countr_zero(static_cast<unsigned>(shares));
    low.num_packets = num_packets(m, rank);
    low.rank_blocks_inverse = device::inverse(rank / kProjectRanks);
    low.packets_inverse = device::inverse(rank / kPacketRanks);
    low.project_blocks = project_blocks(projected, shares, splits);
    low.first_cluster = low.project_blocks / splits;
    low.step = clusters * splits;
    low.num_readers = clusters;
    if (packed_up) {
      ASSERT_TRUE(up_packed.status.ok());
      low.tail = tail;
      low.slice_bytes = format::slice_bytes(kBits);
      low.up = reinterpret_cast<const char*>(up_words.data());
      low.up_row_bytes = up_packed.row_words() * format::kWordBytes;
      low.up_code_bytes = tail_code_bytes(kTile, kBits, tail);
      low.up_bytes = static_cast<uint32_t>(up_bytes(kTile, problem, {rank, true}));
      args.up_map = map_of({up_scales.data(),
                            {n, tail_rows, 1},
                            {kActBytes, int64_t{n} * kActBytes, 0},
                            {kTile.block_n(), tail_rows, 1},
                            false});
    } else {
      args.up_map = map_of({up.data(),
                            {rank, n, 1},
                            {kActBytes, int64_t{rank} * kActBytes, 0},
                            {kUpBoxRanks, kTile.block_n(), 1},
                            true});
    }
  }
  const int idle_warps = kLowRank || emulated::random() % 2 == 0 ? 0 : 4;  // launch/spread.h
  const auto run = [&](int index, int size) {
    emulated::run_cluster(
        index, clusters * splits + args.low.project_blocks, kTile.threads() + idle_warps * format::kLanes,
        [&] { device::gemm_decode<Act, kBits, kTileIndex, kMode, kLowRank>(args); }, size);
  };
  // Blocks that project come once `before` clusters have multiplied; they use a plain pointer to shared memory, and nothing of their cluster.
  const auto run_all = [&](int before) {
    for (int i = 0; i <= clusters; ++i) {
      for (int j = 0; i == before && j < args.low.project_blocks; ++j)
        ASSERT_NO_THROW(run(args.low.first_project_block + j, 1));
      if (i < clusters) ASSERT_NO_THROW(run(args.low.first_cluster + i, splits));
    }
  };
  run_all(0);
  if (kLowRank && clusters == args.start.tiles) {
    // behind the others but for one at least: some find t, some do without (with patience, all who come later find it)
    const std::vector<Act> in_front(out.data(), out.data() + int64_t{m} * n);
    out.fill(int64_t{m} * n, normal);
    ptx::prefetched.clear();
    device::LowRankArgs& low = args.low;
    low.first_project_block = low.step;
    low.first_cluster = 0;
    low.early = early_turns(kTile);
    low.down_piece = static_cast<uint32_t>(down_piece(rank, k, low.step));
    ptx::prefetched_l2 = 0;
    const int before = static_cast<int>(emulated::random() % 3) * (clusters - 1) / 2;
    low.patience = before == 0 && emulated::random() % 2 == 0 ? 1 << 20 : 5;
    run_all(before);
    EXPECT_EQ(ptx::prefetched_l2, int64_t{rank} * k * kActBytes * (1 + args.gemm.tiles_m))
        << "`down` is asked for once by those that multiply, and by those that project, for their tokens";
    EXPECT_EQ(std::memcmp(in_front.data(), out.data(), in_front.size() * sizeof(Act)), 0);
  }

  int64_t asked = 0;
  for (const auto& [start, bytes] : ptx::prefetched) {
    EXPECT_EQ(start, args.next.start + asked) << "what comes next is asked for once, without gaps";
    asked += bytes;
  }
  EXPECT_EQ(asked, args.next.bytes);

  double error = 0, size = 0;
  for (int i = 0; i < m; ++i) {
    std::vector<double> projected(static_cast<size_t>(rank));
    for (int r = 0; r < rank; ++r) {
      for (int c = 0; c < k; ++c)
        projected[static_cast<size_t>(r)] += acts[int64_t{i} * k + c] * down[int64_t{r} * k + c];
    }
    for (int j = 0; j < n; ++j) {
      double wanted = bias[j];
      for (int c = 0; c < k; ++c) {
        if (const int code = codes[static_cast<size_t>(int64_t{j} * k + c)])
          wanted += acts[int64_t{i} * k + c] * code * scales[int64_t{group_size > 0 ? c / group_size : 0} * n + j];
      }
      for (int r = 0; r < rank; ++r) wanted += projected[static_cast<size_t>(r)] * up[int64_t{j} * rank + r];
      const double difference = out[int64_t{i} * n + j] - wanted;
      error += difference * difference;
      size += wanted * wanted;
    }
  }
  // one rounding, with a correction two
  EXPECT_LT(std::sqrt(error / size), half ? 5e-4 : 4e-3);
  for (int i = 0; i < (kLowRank ? sum_packets(m, rank, shares) + args.low.num_packets : 0); ++i) {
    EXPECT_EQ(args.low.packets[i].tag, 0u) << "who launches again, as a graph does, must find no packet of this launch";
  }
  if (kLowRank) {
    EXPECT_EQ(device::LowRankCount{args.low}.begun()->tag, 0u) << "nor that the counter is clear,";
    EXPECT_NE(device::LowRankCount{args.low}.found()->tag, args.low.token) << "nor that somebody else began it,";
    EXPECT_NE(*device::LowRankCount{args.low}.owner(), args.low.token) << "nor whose it is";
  }
}

template <typename Act, int kBits, int kTileIndex, bool kLowRank>
void expect_tile_right() {
  const int tokens = kTilesDecode[kTileIndex].block_m;
  const int more = kLowRank ? std::min(2 * tokens, kMaxTokensLowRank) - 3 : 2 * tokens + 3;
  const int small_group = emulated::random() % 2 == 0 ? 32 : 64;
  expect_right<Act, kBits, kTileIndex, ScaleMode::kTiles, kLowRank>(1, 200, 1088, 128, 132);
  expect_right<Act, kBits, kTileIndex, ScaleMode::kTiles, kLowRank>(more, 264, 1408, 256, 1);
  expect_right<Act, kBits, kTileIndex, ScaleMode::kSteps, kLowRank>(tokens - 1, 136, 1600, small_group, 1);
  expect_right<Act, kBits, kTileIndex, ScaleMode::kNone, kLowRank>(tokens, 72, 640, kChannelwise, 132);
  expect_right<Act, kBits, kTileIndex, ScaleMode::kTiles, kLowRank>(tokens, 72, 2560, 128, 132, 2);
  expect_right<Act, kBits, kTileIndex, ScaleMode::kNone, kLowRank>(tokens / 2 + 1, 40, 3200, kChannelwise, 132, 5);
  if (!kLowRank) return;
  expect_right<Act, kBits, kTileIndex, ScaleMode::kTiles, kLowRank>(1, 200, 1088, 128, 132, 1, true);
  expect_right<Act, kBits, kTileIndex, ScaleMode::kTiles, kLowRank>(more, 264, 1408, 256, 1, 1, true, 104);
  expect_right<Act, kBits, kTileIndex, ScaleMode::kSteps, kLowRank>(tokens - 1, 136, 1600, small_group, 1, 1, true, 40);
  expect_right<Act, kBits, kTileIndex, ScaleMode::kTiles, kLowRank>(tokens, 72, 2560, 128, 132, 2, true, 128);
}
template <typename Act, int kBits, bool kLowRank, int... kTileIndex>
void expect_tiles_right(std::integer_sequence<int, kTileIndex...>) {
  (expect_tile_right<Act, kBits, kTileIndex, kLowRank>(), ...);
}
constexpr auto kAll = std::make_integer_sequence<int, static_cast<int>(kTilesDecode.size())>{};
constexpr auto kSome = std::integer_sequence<int, 0, 2, 3, 4, 7>{};

TEST(EmulatedDecode, EveryTile) { expect_tiles_right<__half, 4, false>(kAll); }
TEST(EmulatedDecode, BFloat16And8Bits) { expect_tiles_right<__nv_bfloat16, 8, false>(kSome); }
TEST(EmulatedDecode, LowRankCorrection) { expect_tiles_right<__half, 4, true>(kSome); }
TEST(EmulatedDecode, LowRankCorrectionInBFloat16And8Bits) { expect_tiles_right<__nv_bfloat16, 8, true>(kSome); }

}  // namespace
}  // namespace sparse_marlin
