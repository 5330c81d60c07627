// Starts the Hopper kernel: tensor maps, clusters, dependent launch.
#include "launch/launch_sm90.h"

#include <array>
#include <atomic>

#include "launch/dependent_launch.cuh"
#include "launch/kernel_table_sm90.h"
#include "launch/l2_policy.h"
#include "launch/launch_token.h"
#include "launch/prepare_kernel.h"
#include "launch/spread.h"
#include "launch/tensor_map.h"
#include "plan/smem_sm90.h"
#include "plan/tiles_all.h"
#include "plan/workspace.h"

namespace sparse_marlin {
namespace {

constexpr int kMaxDevices = 64;

CUtensorMapDataType act_type(const Problem& problem) {
  return problem.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}
// Rows of activations are read 64 values at a time, in the order that wgmma likes.
TensorMap<2> swizzled(const Problem& problem, const void* data, int64_t rows, int64_t cols, int64_t row_elements,
                      int box_rows) {
  return {act_type(problem),
          data,
          {size(cols), size(rows)},
          {size(row_elements * kActBytes)},
          {extent(kHalfCols), extent(box_rows)},
          CU_TENSOR_MAP_SWIZZLE_128B};
}
// The same of activations, both halves of a column tile at once.
TensorMap<3> whole_acts(const Problem& problem, const device::KernelArgs& gemm, int box_rows) {
  return {act_type(problem),
          gemm.params.acts,
          {size(kHalfCols), size(gemm.m), size(gemm.k / kHalfCols)},
          {size(gemm.acts_row * kActBytes), size(kSwizzleRowBytes)},
          {extent(kHalfCols), extent(box_rows), extent(kHalves)},
          CU_TENSOR_MAP_SWIZZLE_128B};
}
TensorMap<3> weights(const void* data, int64_t row_words, int64_t row_tiles, int64_t col_tiles, const TileSm90& tile,
                     const SmemSm90& smem) {
  const int tile_rows = smem.tile_bytes / kMapRowBytes;
  return {CU_TENSOR_MAP_DATA_TYPE_INT32,
          data,
          {size(kMapRowBytes / format::kWordBytes), size(col_tiles * tile_rows), size(row_tiles)},
          {size(kMapRowBytes), size(row_words * format::kWordBytes)},
          {extent(kMapRowBytes / format::kWordBytes), extent(tile_rows), extent(tile.size().row_tiles())}};
}
TensorMap<2> scales(const Problem& problem, const void* data, int64_t row_elements, int64_t groups,
                    const TileSm90& tile) {
  return {act_type(problem),
          data,
          {size(row_elements), size(groups)},
          {size(row_elements * kActBytes)},
          {extent(tile.size().block_n()), extent(scale_rows(problem.group_size))}};
}

cudaError_t write_maps(device::KernelArgsSm90& args, const Problem& problem, const TileSm90& tile,
                       const SmemSm90& smem) {
  const device::KernelArgs& g = args.gemm;
  const int block_m = tile.size().block_m;
  args.last_tokens = g.m - (g.tiles_m - 1) * block_m;
  // blocks that share activations bring a half each
  if (tile.share == 1 && g.k % kHalfCols == 0) args.whole_tiles = g.m / block_m;
  cudaError_t status = cudaSuccess;
  if (args.whole_tiles < g.tiles_m)
    status = swizzled(problem, g.params.acts, g.m, g.k, g.acts_row, args.last_tokens).write(&args.last_map);
  if (status == cudaSuccess && args.whole_tiles > 0) {
    status = whole_acts(problem, g, block_m).write(&args.acts_map);
  } else if (status == cudaSuccess && g.tiles_m > 1) {
    status = swizzled(problem, g.params.acts, g.m, g.k, g.acts_row, block_m).write(&args.acts_map);
  }
  if (status == cudaSuccess && args.copies_out)
    status = swizzled(problem, g.params.out, g.m, g.n, g.n, smem.pass_tokens).write(&args.out_map);
  if (status == cudaSuccess) {
    status = weights(g.params.weights, g.params.weights_row_words, format::row_tiles(g.n), format::col_tiles(g.k), tile,
                     smem)
                 .write(&args.weights_map);
  }
  if (problem.group_size == kChannelwise) return status;
  args.scales_bytes = extent(scale_rows(problem.group_size) * tile.size().block_n() * kActBytes);
  if (status != cudaSuccess) return status;
  return scales(problem, g.params.scales, g.scales_row, g.num_groups, tile).write(&args.scales_map);
}

// Of a correction: its plans have groups, and rows that start at multiples of 16 bytes.
cudaError_t write_tail_maps(device::KernelArgsSm90& args, const Problem& problem, const Plan& plan,
                            const LowRankFactors& factors, const SmemSm90& smem) {
  const device::KernelArgs& g = args.gemm;
  const TileSm90 tile = tile_sm90(plan.tile);
  const auto acts = [&](int box_rows) {
    return swizzled(problem, factors.projected, g.m, plan.rank, plan.rank, box_rows);
  };
  cudaError_t status = acts(args.last_tokens).write(&args.tail_last_map);
  if (status == cudaSuccess && g.tiles_m > 1) status = acts(tile.size().block_m).write(&args.tail_acts_map);
  if (status == cudaSuccess) {
    status = weights(factors.up, factors.up_row_words, format::row_tiles(g.n), plan.tail, tile, smem)
                 .write(&args.tail_weights_map);
  }
  if (status != cudaSuccess) return status;
  const int64_t groups = num_groups(int64_t{plan.tail} * format::kTileCols, problem.group_size);
  return scales(problem, factors.up_scales, g.n, groups, tile).write(&args.tail_scales_map);
}

constexpr int kTables = 4;

}  // namespace

cudaError_t launch_sm90(const Problem& problem, const Plan& plan, const device::KernelArgs& gemm,
                        const LowRankFactors& factors, int device, cudaStream_t stream) {
  static const KernelTableSm90* const tables[kTables] = {&kKernelsSm90F16Int4, &kKernelsSm90F16Int8,
                                                         &kKernelsSm90Bf16Int4, &kKernelsSm90Bf16Int8};
  const int table = (problem.dtype == DType::kFloat16 ? 0 : 2) + (problem.num_bits == 4 ? 0 : 1);
  const int mode = static_cast<int>(scale_mode(problem.group_size)), shape = tile_sm90(plan.tile).shape;
  const GemmKernelSm90 kernel = (*tables[table])[mode][shape];
  const TileSm90 tile = tile_sm90(plan.tile);
  const SmemSm90 smem = smem_sm90(tile.size(), problem.num_bits, scale_mode(problem.group_size));

  static std::array<std::atomic<int>, kMaxDevices * kTables * kScaleModes * kShapesSm90.size()> registers{};
  auto& of_thread = registers[((device * kTables + table) * kScaleModes + mode) * kShapesSm90.size() + shape];
  cudaError_t status = prepare_kernel(reinterpret_cast<const void*>(kernel), device, of_thread);
  if (status != cudaSuccess) return status;

  device::KernelArgsSm90 args{};
  args.gemm = gemm;
  args.own_cols = static_cast<int>(format::col_tiles(problem.k));
  const int cols = args.own_cols + plan.tail, tiles = gemm.tiles_m * gemm.tiles_n;
  args.start = {device::TileOrder::of(gemm.tiles_m, gemm.tiles_n, gemm.splits, cols), tiles, tile.share, {tiles, 0}};
  args.weights_policy = weights_policy(gemm.tiles_m);
  args.cols = device::Divisor::by(static_cast<uint32_t>(cols));
  if (plan.splits < 0) {
    args.start.stream = stream_k(tiles, cols, plan.grid);
    args.flags =
        reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(gemm.partials) + plan.grid * range_sums_bytes(tile.size()));
    args.token = launch_token();
  }
  // where a block has several output tiles, and a map can describe the output's rows
  args.copies_out = equal_passes(tile.size(), smem) && gemm.n % kRowElements == 0 &&
                    tiles > static_cast<int>(plan.grid) / (tile.share * gemm.splits);
  status = write_maps(args, problem, tile, smem);
  if (status == cudaSuccess && plan.tail > 0) status = write_tail_maps(args, problem, plan, factors, smem);
  if (status != cudaSuccess) return status;

  const BlockSize block = block_size(plan, device_properties(device));
  return launch_dependent(kernel, args, plan.grid, block.threads, block.smem_bytes, tile.share * gemm.splits,
                          plan.dependent, stream);
}

}  // namespace sparse_marlin
