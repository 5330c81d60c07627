// The low-rank correction inside the decode kernel: out += (acts * down^T) * up^T, for few tokens (plan/low_rank.h).
//
//   project  blocks in front of the grid: 8 ranks x a share of k each, dense MMAs, operands straight from L2 into registers
//   receive  in the others, the warp that loads waits for their flags while the rest multiply, and copies t = acts * down^T, share by
//            share, from the workspace into shared memory
//   expand   at the end of an output tile each warp adds its part of up * t to its sums, as if k were longer: dense MMAs, or, where `up`
//            is packed, sparse ones like those of the weight, a step of 32 columns a warp
//
// All of it runs once in a block, from an instruction cache that has none of it: short code is fast code, so loops of receive
// and expand are not unrolled, other than over registers.
//
// A flag equals the launch's random token once a block's sums are there; see ranges_sm90.cuh, which does the same. The last block that
// has seen all flags clears them. A block waits for blocks of lower number alone, which start before it: however few run at once,
// those it waits for do.
#pragma once
#include "device/mainloop_decode.cuh"
#include "device/ptx/flag.cuh"
#include "device/ptx/global.cuh"
#include "device/ptx/mma.cuh"

namespace sparse_marlin::device {

template <typename Act, TileDecode kTile>
struct LowRankProject {
  // Units of columns that a warp loads at once, as many as the registers hold.
  static constexpr int kAtOnce = kTile.threads() * kTile.blocks > 640 ? 2 : 4;
  static constexpr int kWarps = kTile.warps();
  static_assert(kMaxTokensLowRank == 2 * kMmaTokens);

  struct Operands {  // of one unit: 8 neighbouring columns a lane
    uint4 down;
    uint4 acts[2];
  };
  // d += acts * down^T of 32 columns. The lanes' columns are neighbours, not those of the MMA's definition: the same for both operands,
  // so that the sum is the same.
  static __device__ __forceinline__ void multiply(float (&d)[2][4], const Operands& o) {
    const uint32_t first[4] = {o.acts[0].x, o.acts[1].x, o.acts[0].y, o.acts[1].y},
                   first_down[2] = {o.down.x, o.down.y};
    const uint32_t second[4] = {o.acts[0].z, o.acts[1].z, o.acts[0].w, o.acts[1].w},
                   second_down[2] = {o.down.z, o.down.w};
    ptx::mma_16<Act>(d[0], first, first_down);
    ptx::mma_16<Act>(d[1], second, second_down);
  }

  // All threads of the block; `shared`: its dynamic shared memory.
  static __device__ __forceinline__ void run(const KernelArgsDecode& args, uint8_t* shared) {
    const LowRankArgs& low = args.low;
    const int warp = threadIdx.x / format::kLanes, lane = threadIdx.x % format::kLanes;
    const int share = blockIdx.x & ((1 << low.shares_log2) - 1),
              rank0 = (blockIdx.x >> low.shares_log2) * kProjectRanks;
    if (rank0 >= low.rank) return;                 // fills a cluster
    const int units = args.gemm.k / kProjectCols;  // k is a multiple of 64
    const int first = units * share >> low.shares_log2, last = units * (share + 1) >> low.shares_log2;
    const int64_t row_bytes = int64_t{args.gemm.k} * kActBytes;
    const char* down = static_cast<const char*>(low.down);
    float4* sums = reinterpret_cast<float4*>(shared);  // [warp][lane]
    if (warp == kWarps) {
      prepare(args, lane, first, last, rank0, down, row_bytes);
    } else {
      project(args, sums, warp, lane, first, last, rank0, down, row_bytes);
    }
    __syncthreads();
    if (warp == 0) publish(args, sums, lane, share, rank0);
  }

  // The warp without a part in the product.
  static __device__ __forceinline__ void prepare(const KernelArgsDecode& args, int lane, int first, int last, int rank0,
                                                 const char* down, int64_t row_bytes) {
    constexpr int kUnitBytes = kProjectCols * kActBytes;
    if (lane < kProjectRanks && first < last)
      ptx::prefetch_l2(down + (rank0 + lane) * row_bytes + first * kUnitBytes, (last - first) * kUnitBytes);
    ptx::grid_dependency_wait();  // the workspace, too, may still be in use by the kernel before
    ptx::grid_launch_dependents();
    // Before this block raises its flag, which comes after a barrier; who counts has seen all flags, so it counts from 0.
    if (blockIdx.x == 0 && lane == 0) *args.low.readers = 0;
    __syncwarp();
  }

  // d += the warp's units: all their operands that the registers hold are asked for before the first is used, `down` before the wait
  // for the kernel before, on which it does not depend.
  template <int kUnits, bool kMore>
  static __device__ __forceinline__ void walk(float (&d)[2][4], int unit, int last, const char* down, const char* acts,
                                              const char* more) {
    constexpr int kStep = kWarps * kProjectCols * kActBytes;
    bool waited = false;
#pragma unroll 1
    for (; unit < last; unit += kUnits * kWarps) {
      Operands o[kUnits];
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        o[i].down = {};
        if (unit + i * kWarps < last) o[i].down = ptx::load_global_v4(down + i * kStep);
      }
      if (!waited) begin();
      waited = true;
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        o[i].acts[0] = o[i].acts[1] = {};
        if (unit + i * kWarps < last) {
          o[i].acts[0] = ptx::load_global_v4(acts + i * kStep);
          if (kMore) o[i].acts[1] = ptx::load_global_v4(more + i * kStep);
        }
      }
      down += kUnits * kStep;
      acts += kUnits * kStep;
      more += kUnits * kStep;
#pragma unroll
      for (int i = 0; i < kUnits; ++i) multiply(d, o[i]);
    }
    if (!waited) begin();
  }
  static __device__ __forceinline__ void begin() {
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
  }

  static __device__ __forceinline__ void project(const KernelArgsDecode& args, float4* sums, int warp, int lane,
                                                 int first, int last, int rank0, const char* down, int64_t row_bytes) {
    const int g = lane / format::kLanesPerRow, c = lane % format::kLanesPerRow;
    constexpr int kUnitBytes = kProjectCols * kActBytes;
    const int tokens = args.gemm.m;
    // tokens that do not exist: the last one again, their sums are not used
    const int64_t at = (first + warp) * int64_t{kUnitBytes} + c * int64_t{sizeof(uint4)};
    const char* down_from = down + (rank0 + g) * row_bytes + at;
    const char* acts = static_cast<const char*>(args.gemm.params.acts) + at;
    const char* acts_from = acts + min(g, tokens - 1) * row_bytes;
    const char* more_from = acts + min(g + kMmaTokens, tokens - 1) * row_bytes;
    const bool more = tokens > kMmaTokens;

    float d[2][4] = {};
    if (more) {
      walk<kAtOnce, true>(d, first + warp, last, down_from, acts_from, more_from);
    } else {
      walk<2 * kAtOnce, false>(d, first + warp, last, down_from, acts_from, more_from);
    }
    sums[warp * format::kLanes + lane] = {d[0][0] + d[1][0], d[0][1] + d[1][1], d[0][2] + d[1][2], d[0][3] + d[1][3]};
  }

  // The warps' sums in their order, to the workspace: (g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1) of tokens x ranks.
  static __device__ __forceinline__ void publish(const KernelArgsDecode& args, const float4* sums, int lane, int share,
                                                 int rank0) {
    const LowRankArgs& low = args.low;
    float4 v = sums[lane];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) {
      const float4 u = sums[i * format::kLanes + lane];
      v = {v.x + u.x, v.y + u.y, v.z + u.z, v.w + u.w};
    }
    const int g = lane / format::kLanesPerRow, pitch = projected_pitch(low.rank), tokens = args.gemm.m;
    float* to = low.sums + (share * tokens + g) * pitch + rank0 + 2 * (lane % format::kLanesPerRow);
    if (g < tokens) *reinterpret_cast<float2*>(to) = {v.x, v.y};
    if (g + kMmaTokens < tokens) *reinterpret_cast<float2*>(to + kMmaTokens * pitch) = {v.z, v.w};
    __syncwarp();
    if (lane == 0) ptx::flag_raise(low.flags + blockIdx.x, low.token);
  }
};

// In a block that multiplies.
template <TileDecode kTile, ScaleMode kMode>
struct LowRankPlaces : DecodePlaces<kTile, kMode, true> {
  using Base = DecodePlaces<kTile, kMode, true>;
  using Base::args;
  using Base::smem;

  // The first block of a cluster adds the correction for all of it.
  static __device__ __forceinline__ bool corrects() { return ptx::cluster_block() == 0; }

  __device__ __forceinline__ uint32_t up() const { return smem + args.smem.up; }
  __device__ __forceinline__ uint32_t projected() const { return smem + args.smem.projected; }
  __device__ __forceinline__ uint32_t up_full() const { return smem + args.smem.up_full; }
  // The shares of t lie where the warps' sums will be: they are added up before.
  __device__ __forceinline__ uint32_t shares() const { return smem + args.smem.exchange; }
  __device__ __forceinline__ uint32_t shares_full() const { return smem + args.smem.shares_full; }
  __device__ __forceinline__ int share_bytes() const {
    return args.gemm.m * projected_pitch(args.low.rank) * int{sizeof(float)};
  }

  // One thread's: barriers, and the first rows of `up`.
  __device__ __forceinline__ void begin() const {
    ptx::mbarrier_init(up_full(), 1);
    ptx::mbarrier_init(shares_full(), 1);
    ptx::mbarrier_init_fence();
    ask_up(this->first_tile());
  }
  // A packed `up` has groups, so that of a channelwise weight is dense.
  __device__ __forceinline__ bool packed() const { return kMode != ScaleMode::kNone && args.low.tail > 0; }
  // A block's slices of it: in one row tile, or in whole ones.
  static constexpr int kRunRows = kTile.block_n() < format::kTileRows ? kTile.block_n() : format::kTileRows;
  static constexpr int kRunSlices = kRunRows / format::kSliceRows;
  static_assert(kTile.block_n() % kRunRows == 0 && format::kTileRows % kRunRows == 0);

  // One thread's: the rows of `up` for an output tile. They depend on no kernel before this one.
  __device__ __forceinline__ void ask_up(int tile) const {
    constexpr int kBoxBytes = kTile.block_n() * kSwizzleRowBytes;
    const int boxes = up_boxes(args.low.rank), n = this->work(tile).tile_n * kTile.block_n();
    if (packed()) {
      ask_packed_up(n);
      return;
    }
    ptx::mbarrier_arrive_expect(up_full(), boxes * kBoxBytes);
#pragma unroll 1
    for (int i = 0; i < boxes; ++i) ptx::tensor_load(up() + i * kBoxBytes, &args.up_map, i * kUpBoxRanks, n, up_full());
  }
  // [row tile][128-column tile] of slices, then the scales.
  __device__ __forceinline__ void ask_packed_up(int n) const {
    const LowRankArgs& low = args.low;
    const int run_bytes = kRunSlices * low.slice_bytes;
    ptx::mbarrier_arrive_expect(up_full(), low.up_bytes);
    uint32_t to = up();
#pragma unroll 1
    for (int row = n; row < n + kTile.block_n(); row += kRunRows) {
      const char* from = low.up + min(row / format::kTileRows, args.start.last_row_tile) * low.up_row_bytes +
                         row % format::kTileRows / format::kSliceRows * low.slice_bytes;
#pragma unroll 1
      for (int i = 0; i < low.tail; ++i) {
        ptx::bulk_load(to, from, run_bytes, up_full());
        to += run_bytes;
        from += format::kTileSlices * low.slice_bytes;
      }
    }
    ptx::tensor_load(to, &args.up_map, n, 0, up_full());
  }
};

// The warp that loads, between and after its requests.
template <TileDecode kTile, ScaleMode kMode>
struct LowRankReceiver : LowRankPlaces<kTile, kMode> {
  using Base = LowRankPlaces<kTile, kMode>;
  using Base::args;
  using Loader = DecodeLoader<kTile, kMode, true>;
  static constexpr unsigned kPollNs = 100;

  // All shares of t into shared memory. Goes on asking for chunks meanwhile, where `asks`.
  __device__ __forceinline__ void run(const Loader& loader, typename Loader::State& asked, bool asks, int lane) const {
    while (!all_raised(lane)) {
      if (asks) loader.ask_where_free(asked);
      __syncwarp();
      __nanosleep(kPollNs);  // who looks all the time keeps weights from coming
    }
    __syncwarp();
    if (!asks) return;
    const int bytes = this->share_bytes() << args.low.shares_log2;
    ptx::fence_async_global();
    ptx::mbarrier_arrive_expect(this->shares_full(), bytes);
    ptx::bulk_load(this->shares(), args.low.sums, bytes, this->shares_full());
  }
  __device__ __forceinline__ bool all_raised(int lane) const {
    bool raised = true;
#pragma unroll 1
    for (int i = lane; i < args.low.senders; i += format::kLanes)
      raised &= ptx::flag_raised(args.low.flags + i, args.low.token);
    return __all_sync(~0u, raised);
  }

  // The last block that has seen all flags clears them.
  __device__ __forceinline__ void done(int lane) const {
    const LowRankArgs& low = args.low;
    bool last = false;
    if (lane == 0) last = atomicAdd(low.readers, 1u) == static_cast<uint32_t>(low.num_readers) - 1;
    if (!__shfl_sync(~0u, last, 0)) return;
#pragma unroll 1
    for (int i = lane; i < low.senders; i += format::kLanes) ptx::flag_clear(low.flags + i);
  }
};

// A warp that computes: sums += its part of up * t. The warps along k share out the ranks.
template <typename Act, typename Warp, TileDecode kTile, ScaleMode kMode>
struct LowRankExpand : LowRankPlaces<kTile, kMode> {
  using Base = LowRankPlaces<kTile, kMode>;
  using Base::args;
  using Sums = typename Warp::Sums;
  static constexpr int kBarrier = 1;  // the epilogue's

  // Channel scales belong to the weights alone, so here they come first.
  __device__ __forceinline__ void scale(Sums& sums, const Warp& warp, int tile_n) const {
    const Act* scales = static_cast<const Act*>(args.gemm.params.scales);
    const int n0 =
        tile_n * kTile.block_n() + warp.warp_n * Warp::kSlices * format::kSliceRows + warp.lane / format::kLanesPerRow;
#pragma unroll
    for (int s = 0; s < Warp::kSlices; ++s) {
      const int n = n0 + s * format::kSliceRows, last = args.gemm.n - 1;
      const float a = Pair<Act>::to_float(bits_of(scales + min(n, last)));
      const float b = Pair<Act>::to_float(bits_of(scales + min(n + format::kHalfRows, last)));
#pragma unroll
      for (int q = 0; q < Warp::kBlocks; ++q) {
        sums.d[s][q].reg[0] *= a;
        sums.d[s][q].reg[1] *= a;
        sums.d[s][q].reg[2] *= b;
        sums.d[s][q].reg[3] *= b;
      }
    }
  }
  static __device__ __forceinline__ uint32_t bits_of(const Act* v) { return *reinterpret_cast<const uint16_t*>(v); }

  // t = the sum of its shares, by all warps that compute; four values at a time, the padding, too.
  __device__ __forceinline__ void add_shares() const {
    constexpr int kThreads = kTile.warps() * format::kLanes;
    ptx::mbarrier_wait(this->shares_full(), 0);
    int first = threadIdx.x;
    asm volatile("" : "+r"(first));  // as below
#pragma unroll 1
    for (int i = first * int{sizeof(float4)}; i < this->share_bytes(); i += kThreads * int{sizeof(float4)}) {
      float4 sum = {};
#pragma unroll 4
      for (int share = 0; share < 1 << args.low.shares_log2; ++share) {
        const uint4 v = ptx::load_shared_v4(this->shares() + share * this->share_bytes() + i);
        sum = {sum.x + __uint_as_float(v.x), sum.y + __uint_as_float(v.y), sum.z + __uint_as_float(v.z),
               sum.w + __uint_as_float(v.w)};
      }
      // rounded, as a dense product would return it
      ptx::store_shared_v2(this->projected() + i / 2, {Pair<Act>::of(sum.x, sum.y), Pair<Act>::of(sum.z, sum.w)});
    }
    ptx::named_barrier(kBarrier, kThreads);
  }
  // Two neighbouring ranks of a token.
  __device__ __forceinline__ uint32_t projected_pair(int token, int rank) const {
    return ptx::load_shared_32(this->projected() + (token * projected_pitch(args.low.rank) + rank) * kActBytes);
  }

  // turn: of the block's output tiles
  __device__ __forceinline__ void add(Sums& sums, const Warp& warp, const BlockWork& work, int turn) const {
    if (kMode == ScaleMode::kNone) scale(sums, warp, work.tile_n);
    const int ranks = args.low.rank;
    if (!this->corrects()) return;
    if (turn == 0) add_shares();
    if constexpr (kMode != ScaleMode::kNone) {
      if (this->packed()) {
        add_packed(sums, warp, work, turn);
        return;
      }
    }
    if (warp.warp_k * kRankUnit >= ranks) return;
    int lane = warp.lane;
    asm volatile("" : "+r"(lane));  // nothing below is worked out before the main loop, which has no registers for it
    const int g = lane / format::kLanesPerRow, c = lane % format::kLanesPerRow;
    const int token0 = work.tile_m * kTile.block_m + g;
    ptx::mbarrier_wait(this->up_full(), turn & 1);
#pragma unroll 1
    for (int rank = warp.warp_k * kRankUnit; rank < ranks; rank += kTile.warps_k * kRankUnit) {
      uint32_t t[Warp::kBlocks][2];
#pragma unroll
      for (int q = 0; q < Warp::kBlocks; ++q) {
        const int token = min(token0 + q * kMmaTokens, args.gemm.m - 1);
        t[q][0] = projected_pair(token, rank + 2 * c);
        // of a rank that is no multiple of 16 the last half does not exist
        t[q][1] = rank + kRankUnit / 2 < ranks ? projected_pair(token, rank + kRankUnit / 2 + 2 * c) : 0;
      }
      // 16-byte piece j of row r of a swizzled box lies at j ^ (r % 8), and rows of slices are multiples of 16
      const int row = warp.warp_n * Warp::kSlices * format::kSliceRows + lane % format::kSliceRows;
      const int piece = rank % kUpBoxRanks * kActBytes / kCopyBytes + lane / format::kSliceRows;
      const uint32_t from = this->up() + (rank / kUpBoxRanks * kTile.block_n() + row) * kSwizzleRowBytes +
                            (piece ^ lane % kMmaTokens) * kCopyBytes;
#pragma unroll
      for (int s = 0; s < Warp::kSlices; ++s) {
        const ptx::FragB up = ptx::ldmatrix_x4(from + s * format::kSliceRows * kSwizzleRowBytes);
#pragma unroll
        for (int q = 0; q < Warp::kBlocks; ++q) ptx::mma_16<Act>(sums.d[s][q].reg, up.reg, t[q]);
      }
    }
  }

  // The same of a packed `up`: the warps along k share out its steps.
  __device__ __forceinline__ void add_packed(Sums& sums, const Warp& warp, const BlockWork& work, int turn) const {
    const int steps = args.low.tail * format::kSliceSteps, ranks = args.low.rank;
    if (warp.warp_k >= steps) return;
    int lane = warp.lane;
    asm volatile("" : "+r"(lane));  // as above
    const int g = lane / format::kLanesPerRow, c = lane % format::kLanesPerRow;
    const int token0 = work.tile_m * kTile.block_m + g, slice0 = warp.warp_n * Warp::kSlices;
    // of a matrix of scales that is read transposed, as in mainloop_decode.cuh
    const uint32_t scales =
        this->up() + args.low.up_code_bytes + (slice0 * format::kSliceRows + lane % 2 * format::kHalfRows) * kActBytes;
    ptx::mbarrier_wait(this->up_full(), turn & 1);
#pragma unroll 1
    for (int at = warp.warp_k; at < steps; at += kTile.warps_k) {
      const int tile = at / format::kSliceSteps, step = at % format::kSliceSteps;
      // the halves of a column tile multiply the same ranks
      const int rank0 = tile * kTailRanks + step % (format::kSliceSteps / kHalves) * format::kStepCols;
      ptx::FragB t[Warp::kBlocks];
#pragma unroll
      for (int q = 0; q < Warp::kBlocks; ++q) {
        const int token = min(token0 + q * kMmaTokens, args.gemm.m - 1);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int rank = rank0 + i * kProjectRanks;
          t[q].reg[i] = rank < ranks ? projected_pair(token, rank + 2 * c) : 0;
        }
      }
      const uint32_t group = scales + (at * format::kStepCols >> args.gemm.group_shift) * kTile.block_n() * kActBytes;
#pragma unroll
      for (int s = 0; s < Warp::kSlices; ++s) {
        const int slice = slice0 + s;
        const uint32_t from = this->up() + ((slice / Base::kRunSlices * args.low.tail + tile) * Base::kRunSlices +
                                            slice % Base::kRunSlices) *
                                               Warp::kSliceBytes;
        const ptx::FragA w = Warp::codes_of_step(from, lane, step);
        const uint32_t e = ptx::load_shared_32(from + Warp::kMetaOffset + lane * uint32_t{sizeof(uint2)} +
                                               step / 2 * format::kWordBytes);
        Sums products;
#pragma unroll
        for (int q = 0; q < Warp::kBlocks; ++q) {
          products.d[s][q] = {};
          if (step % 2 == 0) {
            ptx::mma_sp<Act, 0>(products.d[s][q], w, t[q], e);
          } else {
            ptx::mma_sp<Act, 1>(products.d[s][q], w, t[q], e);
          }
        }
        warp.template add_scaled<1>(sums, products, group, 0, s);
      }
    }
  }
};

}  // namespace sparse_marlin::device
