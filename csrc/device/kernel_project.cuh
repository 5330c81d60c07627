// t = acts * down^T of a low-rank correction, [m, rank] (plan/project.h; compute capability 9.0). Sums of a block's warps along k meet in
// shared memory, those of the blocks along k in the block that owns them, each in a fixed order; one rounding.
//
// For few tokens dense MMAs whose operands come from L2 straight into registers, all that a warp needs at once; for many a ring of
// stages, filled by tensor copies, and wgmma.
#pragma once
#include <cuda.h>

#include <type_traits>

#include "device/dequant.cuh"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/cp_async.cuh"
#include "device/ptx/dependent_launch.cuh"
#include "device/ptx/global.cuh"
#include "device/ptx/hopper.cuh"
#include "device/ptx/mbarrier.cuh"
#include "device/ptx/mma.cuh"
#include "device/ptx/wgmma.cuh"
#include "plan/project.h"
#include "plan/smem_sm90.h"

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
  CUtensorMap acts_map;  // where there is a ring: boxes of 64 rows x 64 columns, 128-byte swizzled
  CUtensorMap down_map;
};

// What a block does of the product, and where its sums go.
template <typename Act, int kShape>
struct ProjectTile {
  static constexpr ProjectShape kTile = kProjectShapes[kShape];
  static constexpr int kVectors = kTile.token_warps * kTile.rank_blocks * format::kLanes;  // of four sums
  struct Received {
    float4 sums[kVectors + 8];  // [block][vector that this one owns]
    uint64_t full;
  };

  const ProjectArgs& args;
  const int share = ptx::cluster_block();
  const int token0 = ptx::cluster_id() / args.rank_tiles * kTile.tokens();
  const int rank0 = ptx::cluster_id() % args.rank_tiles * kTile.ranks();

  __device__ __forceinline__ int first_unit(int of_share) const {
    return (args.k + kTile.unit_cols() - 1) / kTile.unit_cols() * of_share / args.shares;
  }
  // Vector i belongs to block i % shares.
  __device__ __forceinline__ int owned(int block) const { return (kVectors - block + args.shares - 1) / args.shares; }

  // All threads', before anything else.
  __device__ __forceinline__ void begin(Received& received) const {
    if (args.shares == 1) return;
    if (threadIdx.x == 0) {
      const uint32_t full = ptx::smem_address(&received.full);
      ptx::mbarrier_init(full, 1);
      ptx::mbarrier_arrive_expect(full, owned(share) * args.shares * static_cast<int>(sizeof(float4)));
      ptx::mbarrier_init_fence();
    }
    ptx::cluster_arrive();
  }
  // All threads', before the first give(): the others' barriers are ready.
  __device__ __forceinline__ void meet() const {
    if (args.shares > 1) ptx::cluster_wait();
  }
  // This block's sums of vector i.
  __device__ __forceinline__ void give(Received& received, int i, const float4& v) const {
    if (args.shares == 1) {
      store(i, v);
      return;
    }
    const int owner = i % args.shares;
    const uint32_t to = ptx::smem_address(&received.sums[share * owned(owner) + i / args.shares]);
    ptx::store_remote_counted(ptx::remote_address(to, owner),
                              ptx::remote_address(ptx::smem_address(&received.full), owner), v);
  }
  // By `threads` threads, of which this is `thread`: the sums of all blocks.
  __device__ __forceinline__ void finish(Received& received, int thread, int threads) const {
    if (args.shares == 1) return;
    ptx::mbarrier_wait_cluster(ptx::smem_address(&received.full), 0);
    const int count = owned(share);
    for (int i = thread; i < count; i += threads) {
      float4 v = received.sums[i];
      for (int from = 1; from < args.shares; ++from) v = add(v, received.sums[from * count + i]);
      store(i * args.shares + share, v);
    }
  }
  static __device__ __forceinline__ float4 add(const float4& a, const float4& b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
  }
  // Of vector i: (g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1) of 16 tokens x 8 ranks.
  __device__ __forceinline__ void store(int i, const float4& v) const {
    const int lane = i % format::kLanes, block = i / format::kLanes;
    const int rank = rank0 + block % kTile.rank_blocks * 8 + 2 * (lane % format::kLanesPerRow);
    const int token = token0 + block / kTile.rank_blocks * 16 + lane / format::kLanesPerRow;
    if (rank >= args.rank) return;
    uint32_t* out = static_cast<uint32_t*>(args.out);  // of two ranks
    const int64_t at = (int64_t{token} * args.rank + rank) / 2;
    if (token < args.m) out[at] = Pair<Act>::of(v.x, v.y);
    if (token + 8 < args.m) out[at + 4 * int64_t{args.rank}] = Pair<Act>::of(v.z, v.w);
  }
};

// Few tokens.
template <typename Act, int kShape>
struct Project : ProjectTile<Act, kShape> {
  using Base = ProjectTile<Act, kShape>;
  using Base::args;
  using Base::kTile;
  using Base::kVectors;
  using Base::rank0;
  using Base::token0;
  static constexpr int kRankBlocks = kTile.rank_blocks, kWarpsK = kTile.warps_k, kAtOnce = kTile.at_once;
  static constexpr int kUnitBytes = kTile.unit_cols() * kActBytes;
  struct Shared {
    float4 warps[kWarpsK][kVectors];
    typename Base::Received received;
  };

  // d += this warp's units. The lanes' columns are neighbours, not those of the MMA's definition: the same for both operands, so that the
  // sum is the same. `down` depends on no kernel before this one.
  __device__ __forceinline__ void walk(float (&d)[kRankBlocks][4], int token_warp, int warp_k, int lane) const {
    const int g = lane / format::kLanesPerRow, c = lane % format::kLanesPerRow;
    const int first = this->first_unit(this->share), last = this->first_unit(this->share + 1);
    const int64_t row_bytes = int64_t{args.k} * kActBytes;
    const int token = token0 + token_warp * 16 + g;
    // tokens that do not exist: the last one again, its sums are not used
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
        const bool there = at < last && at * kTile.unit_cols() + c * 8 < args.k;
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
        const bool there = at < last && at * kTile.unit_cols() + c * 8 < args.k;
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

  __device__ __forceinline__ void run(void* bytes) const {
    Shared& shared = *static_cast<Shared*>(bytes);
    const int warp = threadIdx.x / format::kLanes, lane = threadIdx.x % format::kLanes;
    const int token_warp = warp % kTile.token_warps, warp_k = warp / kTile.token_warps;
    this->begin(shared.received);
    float d[kRankBlocks][4] = {};
    walk(d, token_warp, warp_k, lane);
#pragma unroll
    for (int j = 0; j < kRankBlocks; ++j) {
      shared.warps[warp_k][(token_warp * kRankBlocks + j) * format::kLanes + lane] = {d[j][0], d[j][1], d[j][2],
                                                                                      d[j][3]};
    }
    this->meet();
    __syncthreads();
    for (int i = threadIdx.x; i < kVectors; i += kTile.threads()) {
      float4 v = shared.warps[0][i];
#pragma unroll
      for (int w = 1; w < kWarpsK; ++w) v = this->add(v, shared.warps[w][i]);
      this->give(shared.received, i, v);
    }
    this->finish(shared.received, threadIdx.x, kTile.threads());
  }
};

// Many tokens.
template <typename Act, int kShape>
struct ProjectRing : ProjectTile<Act, kShape> {
  using Base = ProjectTile<Act, kShape>;
  using Base::args;
  using Base::kTile;
  using Base::rank0;
  using Base::token0;
  static constexpr int kConsumers = kTile.token_warps * kTile.warps_k;
  static constexpr int kBoxBytes = kTile.tokens() * kSwizzleRowBytes;
  static_assert(kTile.tokens() == 64 && kTile.ranks() == 64 && kConsumers == 4, "the shape of a warpgroup's MMA");
  struct Shared {
    uint8_t stages[kProjectStages][2][kBoxBytes];  // acts, down
    typename Base::Received received;
    uint64_t full[kProjectStages];
    uint64_t empty[kProjectStages];
  };

  __device__ __forceinline__ void ask_down(Shared& shared, int unit, int stage) const {
    const uint32_t full = ptx::smem_address(&shared.full[stage]);
    ptx::mbarrier_arrive_expect(full, 2 * kBoxBytes);
    ptx::tensor_load(ptx::smem_address(shared.stages[stage][1]), &args.down_map, unit * kTile.unit_cols(), rank0, full);
  }
  __device__ __forceinline__ void ask_acts(Shared& shared, int unit, int stage) const {
    ptx::tensor_load(ptx::smem_address(shared.stages[stage][0]), &args.acts_map, unit * kTile.unit_cols(), token0,
                     ptx::smem_address(&shared.full[stage]));
  }
  // One thread's. The first stages' share of `down` does not wait for the kernel before.
  __device__ __forceinline__ void produce(Shared& shared, int first, int last) const {
    const int begun = min(last, first + kProjectStages);
#pragma unroll 1
    for (int unit = first; unit < begun; ++unit) ask_down(shared, unit, unit - first);
    ptx::grid_dependency_wait();
#pragma unroll 1
    for (int unit = first; unit < begun; ++unit) ask_acts(shared, unit, unit - first);
    int stage = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int unit = begun; unit < last; ++unit) {
      ptx::mbarrier_wait(ptx::smem_address(&shared.empty[stage]), parity);
      ask_down(shared, unit, stage);
      ask_acts(shared, unit, stage);
      if (++stage == kProjectStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
  __device__ __forceinline__ void consume(Shared& shared, float (&d)[32], int units) const {
    int stage = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int i = 0; i < units; ++i) {
      ptx::mbarrier_wait(ptx::smem_address(&shared.full[stage]), parity);
      const uint32_t acts = ptx::descriptor_low(ptx::smem_address(shared.stages[stage][0]));
      const uint32_t down = ptx::descriptor_low(ptx::smem_address(shared.stages[stage][1]));
      constexpr int kSteps = 4, kStepUnits = 32 / 16;  // of 16 columns, whose 32 bytes a descriptor counts in sixteens
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        ptx::wgmma_64x64x16<Act>(d, ptx::descriptor(acts + step * kStepUnits),
                                 ptx::descriptor(down + step * kStepUnits));
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      if (ptx::elect_one()) ptx::mbarrier_arrive(ptx::smem_address(&shared.empty[stage]));
      if (++stage == kProjectStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }

  __device__ __forceinline__ void run(void* bytes) const {
    Shared& shared = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(bytes) + kSwizzleAlign - 1) &
                                                ~uintptr_t{kSwizzleAlign - 1});
    const int warp = __shfl_sync(~0u, threadIdx.x / format::kLanes, 0), lane = threadIdx.x % format::kLanes;
    if (threadIdx.x < kProjectStages) {
      ptx::mbarrier_init(ptx::smem_address(&shared.full[threadIdx.x]), 1);
      ptx::mbarrier_init(ptx::smem_address(&shared.empty[threadIdx.x]), kConsumers);
      ptx::mbarrier_init_fence();
    }
    this->begin(shared.received);
    __syncthreads();
    const int first = this->first_unit(this->share), last = this->first_unit(this->share + 1);
    if (warp == kConsumers) {
      if (ptx::elect_one()) produce(shared, first, last);
      __syncwarp();
      this->meet();
      return;
    }
    float d[32] = {};
    consume(shared, d, last - first);
    this->meet();
#pragma unroll
    for (int j = 0; j < kTile.rank_blocks; ++j) {
      this->give(shared.received, (warp * kTile.rank_blocks + j) * format::kLanes + lane,
                 {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]});
    }
    this->finish(shared.received, threadIdx.x, kConsumers * format::kLanes);
  }
};

template <typename Act, int kShape>
using ProjectOf = std::conditional_t<kProjectShapes[kShape].has_ring(), ProjectRing<Act, kShape>, Project<Act, kShape>>;

template <typename Act, int kShape>
__global__ void __launch_bounds__(kProjectShapes[kShape].threads()) project(const __grid_constant__ ProjectArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint4 bytes[];
  ptx::grid_launch_dependents();  // who comes next waits for this grid's end before it reads what this grid writes
  ProjectOf<Act, kShape>{args}.run(bytes);
#endif
}

}  // namespace sparse_marlin::device
