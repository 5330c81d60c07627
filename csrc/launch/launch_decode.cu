// Starts the decode kernel: tensor maps, shared memory, dependent launch.
#include "launch/launch_decode.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>

#include "device/scheduler.cuh"
#include "launch/dependent_launch.cuh"
#include "launch/kernel_table_decode.h"
#include "launch/l2_policy.h"
#include "launch/launch.h"
#include "launch/launch_token.h"
#include "launch/prepare_kernel.h"
#include "launch/spread.h"
#include "launch/tensor_map.h"
#include "plan/low_rank.h"
#include "plan/smem_decode.h"
#include "plan/tiles_all.h"
#include "plan/workspace.h"

namespace sparse_marlin {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kTables = 8;
// Of the next weights, what is brought into L2 ahead of them: the memory has time for that while a norm or attention runs, and more would be
// in the way of what those read (docs/KERNEL_SM90.md, attempt 61).
constexpr int64_t kMostAhead = 8 << 20;

CUtensorMapDataType act_type(const Problem& problem) {
  return problem.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

cudaError_t write_maps(device::KernelArgsDecode& args, const Problem& problem, const TileDecode& tile) {
  const device::KernelArgs& g = args.gemm;
  const CUtensorMapDataType act = act_type(problem);
  // 64 columns of a token are one row of a swizzled box; one copy brings a chunk, [column / 64][token]
  const cudaError_t status = TensorMap<3>{act,
                                          g.params.acts,
                                          {size(kHalfCols), size(g.m), size(g.k / kHalfCols)},
                                          {size(g.acts_row) * kActBytes, size(kSwizzleRowBytes)},
                                          {extent(kHalfCols), extent(args.smem.rows), extent(tile.warps_k * kHalves)},
                                          CU_TENSOR_MAP_SWIZZLE_128B}
                                 .write(&args.acts_map);
  if (status != cudaSuccess || problem.group_size == kChannelwise) return status;
  return TensorMap<2>{act,
                      g.params.scales,
                      {size(g.scales_row), size(g.num_groups)},
                      {size(g.scales_row) * kActBytes},
                      {extent(tile.block_n()), extent(chunk_scale_rows(tile, problem.group_size))}}
      .write(&args.scales_map);
}

device::LowRankArgs low_rank_args(const Problem& problem, const Plan& plan, const device::KernelArgs& gemm,
                                  const LowRankFactors& factors) {
  const TileDecode& tile = tile_decode(plan.tile);
  char* base = static_cast<char*>(gemm.params.workspace) + workspace(problem, 0).size;
  device::LowRankArgs low{};
  low.down = factors.down;
  low.count = reinterpret_cast<uint32_t*>(base);
  low.packets = reinterpret_cast<ptx::Packet*>(base + kWorkspaceAlign);
  low.token = launch_token();
  low.rank = plan.rank;
  low.shares_log2 = std::countr_zero(static_cast<unsigned>(plan.shares));
  low.num_packets = num_packets(problem.m, plan.rank);
  low.rank_blocks_inverse = device::inverse(plan.rank / kProjectRanks);
  low.packets_inverse = device::inverse(plan.rank / kPacketRanks);
  low.project_blocks = plan.project_blocks;
  low.first_cluster = plan.project_blocks / plan.splits;
  low.step = static_cast<int>(plan.grid) - plan.project_blocks;
  low.num_readers = low.step / plan.splits;
  if (plan.behind) {
    low.first_project_block = low.step;
    low.first_cluster = 0;
    low.patience = kLooks;
    low.early = early_turns(tile);
    low.down_piece = static_cast<uint32_t>(down_piece(plan.rank, problem.k, low.step));
  }
  if (plan.tail > 0) {
    low.tail = plan.tail;
    low.slice_bytes = format::slice_bytes(problem.num_bits);
    low.up = static_cast<const char*>(factors.up);
    low.up_row_bytes = factors.up_row_words * format::kWordBytes;
    low.up_code_bytes = tail_code_bytes(tile, problem.num_bits, plan.tail);
    low.up_bytes = static_cast<uint32_t>(up_bytes(tile, problem, {plan.rank, true}));
  }
  return low;
}

cudaError_t write_up_map(device::KernelArgsDecode& args, const Problem& problem, const Plan& plan,
                         const LowRankFactors& factors) {
  const TileDecode& tile = tile_decode(plan.tile);
  if (plan.tail > 0) {
    const int groups = tail_groups(plan.tail, problem.group_size);
    return TensorMap<2>{act_type(problem),
                        factors.up_scales,
                        {size(problem.n), size(groups)},
                        {size(problem.n) * kActBytes},
                        {extent(tile.block_n()), extent(groups)}}
        .write(&args.up_map);
  }
  return TensorMap<2>{act_type(problem),
                      factors.up,
                      {size(plan.rank), size(problem.n)},
                      {size(plan.rank) * kActBytes},
                      {extent(kUpBoxRanks), extent(tile.block_n())},
                      CU_TENSOR_MAP_SWIZZLE_128B}
      .write(&args.up_map);
}

device::DecodeStart start_args(const Problem& problem, const Plan& plan, const device::KernelArgs& gemm,
                               const SmemDecode& smem) {
  const TileDecode& tile = tile_decode(plan.tile);
  device::DecodeStart start{};
  start.weights = reinterpret_cast<const char*>(gemm.params.weights);
  start.policy = weights_policy(gemm.tiles_m);
  start.row_copies = static_cast<uint32_t>(gemm.params.weights_row_words * format::kWordBytes / kCopyBytes);
  start.last_row_tile = static_cast<int>(format::row_tiles(problem.n)) - 1;
  start.tiles_m = gemm.tiles_m;
  start.tiles_m_inverse = device::inverse(gemm.tiles_m);
  start.tiles = gemm.tiles_m * gemm.tiles_n;
  start.cols = static_cast<int>(format::col_tiles(problem.k));
  start.turns = turns(tile, problem.k, plan.splits);
  start.col_step = tile.warps_k * plan.splits;
  start.splits = plan.splits;
  start.stages = smem.stages;
  start.ring = smem.weights;
  start.weights_full = smem.weights_full;
  return start;
}

}  // namespace

cudaError_t launch_decode(const Problem& problem, const Plan& plan, const device::KernelArgs& gemm,
                          const LowRankFactors& factors, const NextWeights& next, int device, cudaStream_t stream) {
  static const KernelTableDecode* const tables[kTables] = {
      &kKernelsDecodeF16Int4,         &kKernelsDecodeF16Int8,        &kKernelsDecodeBf16Int4,
      &kKernelsDecodeBf16Int8,        &kKernelsDecodeLowRankF16Int4, &kKernelsDecodeLowRankF16Int8,
      &kKernelsDecodeLowRankBf16Int4, &kKernelsDecodeLowRankBf16Int8};
  const int table =
      (plan.rank > 0 ? 4 : 0) + (problem.dtype == DType::kFloat16 ? 0 : 2) + (problem.num_bits == 4 ? 0 : 1);
  const int mode = static_cast<int>(scale_mode(problem.group_size)), index = tile_decode_index(plan.tile);
  const GemmKernelDecode kernel = (*tables[table])[mode][index];

  static std::array<std::atomic<int>, kMaxDevices * kTables * kScaleModes * kTilesDecode.size()> registers{};
  auto& of_thread = registers[((device * kTables + table) * kScaleModes + mode) * kTilesDecode.size() + index];
  cudaError_t status = prepare_kernel(reinterpret_cast<const void*>(kernel), device, of_thread);
  if (status != cudaSuccess) return status;

  device::KernelArgsDecode args{};
  args.gemm = gemm;
  const Device& gpu = device_properties(device);
  const TileDecode& tile = tile_decode(plan.tile);
  args.smem = decode_layout(problem, tile, plan.splits, gpu.num_sms, gpu.smem_per_sm, {plan.rank, plan.tail > 0});
  args.splits_inverse = device::inverse(plan.splits);
  args.start = start_args(problem, plan, gemm, args.smem);
  status = write_maps(args, problem, tile);
  if (status == cudaSuccess && plan.rank > 0) {
    args.low = low_rank_args(problem, plan, gemm, factors);
    status = write_up_map(args, problem, plan, factors);
  }
  if (status != cudaSuccess) return status;
  args.next = {static_cast<const char*>(next.start), static_cast<uint32_t>(std::min(next.bytes, kMostAhead))};
  const BlockSize block = block_size(plan, gpu, of_thread.load(std::memory_order_relaxed));
  return launch_dependent(kernel, args, plan.grid, block.threads, block.smem_bytes, plan.splits, plan.dependent,
                          stream);
}

}  // namespace sparse_marlin
