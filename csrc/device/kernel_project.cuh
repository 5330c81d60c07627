// t = acts * down^T of a low-rank correction, [m, rank] (plan/project.h; compute capability 9.0). Dense MMAs whose operands come from
// L2 straight into registers; sums of the warps along k meet in shared memory, those of the blocks along k in the block that owns
// them, each in a fixed order; one rounding.
#pragma once
#include "device/dequant.cuh"
#include "device/ptx/cp_async.cuh"
#include "device/ptx/dependent_launch.cuh"
#include "device/ptx/global.cuh"
#include "device/ptx/hopper.cuh"
#include "device/ptx/mbarrier.cuh"
#include "device/ptx/mma.cuh"
#include "plan/project.h"

namespace sparse_marlin::device {

struct ProjectArgs {
  const void* acts;  // [m, k] row-major, as are the others; 16-bit values
  const void* down;  // [rank, k]
  void* out;         // [m, rank]
  int m;
  int k;
  int rank;
  int rank_tiles;
  int shares;
};

template <typename Act, int kShape>
struct Project {
  static constexpr ProjectShape kTile = kProjectShapes[kShape];
  static constexpr int kRankBlocks = kTile.rank_blocks, kWarpsK = kTile.warps_k();
  static constexpr int kThreads = ProjectShape::kWarps * format::kLanes;
  static constexpr int kVectors = kTile.token_warps * kRankBlocks * format::kLanes;  // of four sums, of a block's tile
  static constexpr int kAtOnce = kTile.at_once;
  static constexpr int kActBytes = 2;
  static constexpr int kUnitBytes = kProjectUnitCols * kActBytes;
  struct Shared {
    float4 warps[kWarpsK][kVectors];
    float4 received[kVectors + 8];  // [block][vector it owns]
    uint64_t full;
  };

  const ProjectArgs& args;
  const int share = ptx::cluster_block();
  const int warp = threadIdx.x / format::kLanes, lane = threadIdx.x % format::kLanes;
  const int token_warp = warp % kTile.token_warps, warp_k = warp / kTile.token_warps;
  const int g = lane / format::kLanesPerRow, c = lane % format::kLanesPerRow;
  const int token0 = ptx::cluster_id() / args.rank_tiles * kTile.tokens();
  const int rank0 = ptx::cluster_id() % args.rank_tiles * kTile.ranks();

  // d += this warp's units. The lanes' columns are neighbours, not those of the MMA's definition: the same for both operands, so that the
  // sum is the same. `down` depends on no kernel before this one.
  __device__ __forceinline__ void walk(float (&d)[kRankBlocks][4]) const {
    const int units = (args.k + kProjectUnitCols - 1) / kProjectUnitCols;
    const int first = units * share / args.shares, last = units * (share + 1) / args.shares;
    const int64_t row_bytes = int64_t{args.k} * kActBytes;
    const int token = token0 + token_warp * 16 + g;
    // tokens and ranks that do not exist: the last ones again, their sums are not used
    const char* acts = static_cast<const char*>(args.acts) + c * sizeof(uint4);
    const char* rows[2] = {acts + min(token, args.m - 1) * row_bytes, acts + min(token + 8, args.m - 1) * row_bytes};
    const char* down = static_cast<const char*>(args.down) + (rank0 + g) * row_bytes + c * sizeof(uint4);
    const int blocks = min(kRankBlocks, (args.rank - rank0) / 8);
    bool waited = false;
#pragma unroll 1
    for (int unit = first + warp_k; unit < last; unit += kAtOnce * kWarpsK) {
      uint4 a[kAtOnce][2], b[kAtOnce][kRankBlocks];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = unit + i * kWarpsK;
        const bool there = at < last && at * kProjectUnitCols + c * 8 < args.k;
#pragma unroll
        for (int j = 0; j < kRankBlocks; ++j) {
          b[i][j] = {};
          if (there && j < blocks) b[i][j] = ptx::load_global_shared_v4(down + j * 8 * row_bytes + at * kUnitBytes);
        }
      }
      if (!waited) ptx::grid_dependency_wait();
      waited = true;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = unit + i * kWarpsK;
        const bool there = at < last && at * kProjectUnitCols + c * 8 < args.k;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          a[i][h] = {};
          if (there) a[i][h] = ptx::load_global_v4(rows[h] + at * kUnitBytes);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t low[4] = {a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y},
                       high[4] = {a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w};
#pragma unroll
        for (int j = 0; j < kRankBlocks; ++j) {
          const uint32_t first_down[2] = {b[i][j].x, b[i][j].y}, second_down[2] = {b[i][j].z, b[i][j].w};
          ptx::mma_16<Act>(d[j], low, first_down);
          ptx::mma_16<Act>(d[j], high, second_down);
        }
      }
    }
    if (!waited) ptx::grid_dependency_wait();
  }

  __device__ __forceinline__ void run(Shared& shared) const {
    ptx::grid_launch_dependents();  // who comes next waits for this grid's end before it reads what this grid writes
    const uint32_t full = ptx::smem_address(&shared.full);
    if (threadIdx.x == 0 && args.shares > 1) {
      const int owned = (kVectors - share + args.shares - 1) / args.shares;
      ptx::mbarrier_init(full, 1);
      ptx::mbarrier_arrive_expect(full, owned * args.shares * static_cast<int>(sizeof(float4)));
      ptx::mbarrier_init_fence();
    }
    if (args.shares > 1) ptx::cluster_arrive();
    float d[kRankBlocks][4] = {};
    walk(d);
#pragma unroll
    for (int j = 0; j < kRankBlocks; ++j) {
      shared.warps[warp_k][(token_warp * kRankBlocks + j) * format::kLanes + lane] = {d[j][0], d[j][1], d[j][2],
                                                                                      d[j][3]};
    }
    if (args.shares > 1) ptx::cluster_wait();  // the others' barriers are ready
    __syncthreads();
    for (int i = threadIdx.x; i < kVectors; i += kThreads) {
      float4 v = shared.warps[0][i];
#pragma unroll
      for (int w = 1; w < kWarpsK; ++w) v = add(v, shared.warps[w][i]);
      if (args.shares == 1) {
        store(i, v);
        continue;
      }
      const int owner = i % args.shares, owned = (kVectors - owner + args.shares - 1) / args.shares;
      const uint32_t to = ptx::smem_address(&shared.received[share * owned + i / args.shares]);
      ptx::store_remote_counted(ptx::remote_address(to, owner), ptx::remote_address(full, owner), v);
    }
    if (args.shares == 1) return;
    ptx::mbarrier_wait_cluster(full, 0);
    const int owned = (kVectors - share + args.shares - 1) / args.shares;
    for (int i = threadIdx.x; i < owned; i += kThreads) {
      float4 v = shared.received[i];
      for (int from = 1; from < args.shares; ++from) v = add(v, shared.received[from * owned + i]);
      store(i * args.shares + share, v);
    }
  }
  static __device__ __forceinline__ float4 add(const float4& a, const float4& b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
  }
  // Of vector i: (g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1) of 16 tokens x 8 ranks.
  __device__ __forceinline__ void store(int i, const float4& v) const {
    const int lane_of = i % format::kLanes, block = i / format::kLanes;
    const int rank = rank0 + block % kRankBlocks * 8 + 2 * (lane_of % format::kLanesPerRow);
    const int token = token0 + block / kRankBlocks * 16 + lane_of / format::kLanesPerRow;
    if (rank >= args.rank) return;
    uint32_t* out = static_cast<uint32_t*>(args.out);  // of two ranks
    const int64_t at = (int64_t{token} * args.rank + rank) / 2;
    if (token < args.m) out[at] = Pair<Act>::of(v.x, v.y);
    if (token + 8 < args.m) out[at + 4 * int64_t{args.rank}] = Pair<Act>::of(v.z, v.w);
  }
};

template <typename Act, int kShape>
__global__ void __launch_bounds__(Project<Act, kShape>::kThreads) project(const __grid_constant__ ProjectArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ float4 bytes[];
  Project<Act, kShape>{args}.run(*reinterpret_cast<typename Project<Act, kShape>::Shared*>(bytes));
#endif
}

}  // namespace sparse_marlin::device
