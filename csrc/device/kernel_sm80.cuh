// The portable kernel (mma.sp, compute capability 8.0 and up) as an outline: place, main loop, epilogue.
#pragma once
#include "device/epilogue.cuh"
#include "device/mainloop_sm80.cuh"
#include "device/ptx/dependent_launch.cuh"

namespace sparse_marlin::device {

// The tile goes by its index in kTiles, not by value: nvcc 13.0 cannot write the host stub of a kernel whose template argument is a
// class.
template <typename Act, int kBits, int kTileIndex, ScaleMode kMode>
__global__ void __launch_bounds__(kTiles[kTileIndex].threads(), kTiles[kTileIndex].min_blocks)
    gemm_sm80(const __grid_constant__ KernelArgs args) {
  constexpr Tile kTile = kTiles[kTileIndex];
  using Loop = Mainloop<Act, kBits, kTile, kMode>;
  using End = Epilogue<Act, Loop, kTile>;
  extern __shared__ __align__(kActRowBytes) uint8_t shared[];

  const int warp = threadIdx.x / format::kLanes, lane = threadIdx.x % format::kLanes;
  const int team = warp / kTile.team_warps(), in_team = warp % kTile.team_warps();
  const int warp_n = in_team % kTile.warps_n, warp_m = in_team / kTile.warps_n;
  const BlockWork work = block_work(blockIdx.x, args.tiles_m, args.tiles_n, args.splits, format::col_tiles(args.k));
  const typename Loop::WarpPlace place{lane, warp_n * kTile.warp_n(), warp_m * kTile.warp_m()};

  const int ring_bytes = args.num_stages * stage_bytes(kTile, kBits, args.act_rows, args.group_size);
  // The teams take the column tiles in turn; the first team has the most.
  const int first = work.first_col + team, count = max(0, (work.last_col - first + kTile.warps_k - 1) / kTile.warps_k);
  const int most = (work.last_col - work.first_col + kTile.warps_k - 1) / kTile.warps_k;
  Copies<kBits, kTile> copies(args, work, first, threadIdx.x % kTile.team_threads());
  copies.prefetch_weights(args.num_stages, count);
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  typename Loop::Sums sums = {};
  Loop{args, copies, ptx::smem_address(shared) + team * ring_bytes, scale_rows(args.group_size), place, team}.run(
      sums, count, most);

  float* exchange = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int pass = 0; pass < End::kPasses; ++pass) {
    __syncthreads();  // rings drained, or the pass before stored
    End::share(sums, exchange, pass, team, warp_m, place.row0, lane);
    __syncthreads();
    End::store(args, work, exchange, pass);
  }
}

}  // namespace sparse_marlin::device
