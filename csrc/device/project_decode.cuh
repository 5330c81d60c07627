// The first factor of a low-rank correction inside the decode kernel: t = acts * down^T (plan/low_rank.h), by blocks of their own, 8 tokens x
// 8 ranks x a share of k each: dense MMAs, operands straight from L2 into registers. Their sums go to the block of the last share, which adds
// them in the order of the shares; t leaves it in packets of four values and a tag.
//
// A packet's tag is the launch's random token. Who has read it last clears it, so that a launch with the same token, of a graph's next
// replay, finds none: of a share's sums the block that adds them, of t the last one of all that read it and all that publish it.
//
// Blocks start in the order of their numbers, and those that run may keep others from starting, for ever if they waited for them. Blocks
// of lower number have started. For those behind a block waits a while; then it works out for itself what is missing, to the same last bit,
// and publishes it.
#pragma once
#include "device/mainloop_decode.cuh"
#include "device/ptx/global.cuh"
#include "device/ptx/mma.cuh"
#include "device/ptx/packet.cuh"

namespace sparse_marlin::device {

// Who counts himself as done: what follows tells who was the last.
struct LowRankCount {
  const LowRankArgs& low;

  // In the workspace, behind the counter: it counts from 0.
  __device__ __forceinline__ ptx::Packet* begun() const { return reinterpret_cast<ptx::Packet*>(low.readers) + 1; }
  // One thread's of the grid's first block, for which all others may wait; after the wait for the kernel before.
  __device__ __forceinline__ void begin() const {
    *low.readers = 0;
    __threadfence();
    ptx::packet_store(begun(), {}, low.token);
  }
  // A warp's, once it has t or has published its part. The last one clears the packets.
  __device__ __forceinline__ void done(int readers, int lane) const {
    bool last = false;
    if (lane == 0) {
      while (ptx::packet_load(begun()).tag != low.token) {
      }
      __threadfence();  // the reads of this block are over before another one clears
      last = atomicAdd(low.readers, 1u) == static_cast<uint32_t>(readers + low.groups) - 1;
    }
    if (!__shfl_sync(~0u, last, 0)) return;
#pragma unroll 1
    for (int i = lane; i < low.num_packets; i += format::kLanes) ptx::packet_store(low.packets + i, {}, 0);
    if (lane == 0) ptx::packet_store(begun(), {}, 0);
  }
};

template <typename Act, TileDecode kTile>
struct LowRankProject {
  // Units of columns that a warp loads at once, as many as the registers hold.
  static constexpr int kAtOnce = kTile.threads() * kTile.blocks > 640 ? 4 : 8;
  static constexpr int kWarps = kTile.warps();
  static constexpr int kUnitBytes = kProjectCols * kActBytes;
  static constexpr int kStep = kWarps * kUnitBytes;  // from a warp's unit to its next

  const KernelArgsDecode& args;

  struct Piece {
    int share, rank0, token0;
    int first, last;  // units of the share
  };
  __device__ __forceinline__ int shares() const { return 1 << args.low.shares_log2; }
  __device__ __forceinline__ Piece piece(int group, int share) const {
    const LowRankArgs& low = args.low;
    const int token_block = divide(group, low.rank_blocks_inverse);
    const int units = args.gemm.k / kProjectCols;  // k is a multiple of 64
    return {share, group * kProjectRanks - token_block * low.rank, token_block * kMmaTokens,
            units * share >> low.shares_log2, units * (share + 1) >> low.shares_log2};
  }
  __device__ __forceinline__ int64_t row_bytes() const { return int64_t{args.gemm.k} * kActBytes; }
  __device__ __forceinline__ int readers() const { return divide(args.low.step, args.splits_inverse); }
  static __device__ __forceinline__ float2 add(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }

  // All threads of the block, number `index` of those that project; `shared`: its dynamic shared memory.
  static __device__ __forceinline__ void run(const KernelArgsDecode& args, int index, uint8_t* shared) {
    const LowRankProject mine{args};
    const int group = index >> args.low.shares_log2;
    if (group >= args.low.groups) return;  // fills a cluster
    const Piece p = mine.piece(group, index & (mine.shares() - 1));
    float2* const sums = reinterpret_cast<float2*>(shared);  // [warp][lane]
    const int warp = threadIdx.x / format::kLanes, lane = threadIdx.x % format::kLanes;
    if (warp == kWarps) {
      mine.prepare(p, lane);
    } else {
      sums[warp * format::kLanes + lane] = mine.template part<true>(p, warp, lane);
    }
    __syncthreads();
    if (warp > 0) return;
    float2 v = sums[lane];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) v = add(v, sums[i * format::kLanes + lane]);
    mine.send(p, v, lane);
  }

  // The warp without a part in the product.
  __device__ __forceinline__ void prepare(const Piece& p, int lane) const {
    if (lane < kProjectRanks && p.first < p.last)
      ptx::prefetch_l2(static_cast<const char*>(args.low.down) + (p.rank0 + lane) * row_bytes() + p.first * kUnitBytes,
                       (p.last - p.first) * kUnitBytes);
    begin();  // the workspace, too, may still be in use by the kernel before
    if (blockIdx.x == 0 && lane == 0) LowRankCount{args.low}.begin();
    __syncwarp();
  }
  static __device__ __forceinline__ void begin() {
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
  }

  // Sums of the units that warp `warp` has of a piece, of tokens x ranks (g, 2c) and (g, 2c + 1): all their operands that the registers hold
  // are asked for before the first is used, `down` before the wait for the kernel before, on which it does not depend. The lanes' columns
  // are neighbours, not those of the MMA's definition: the same for both operands, so that the sum is the same.
  template <bool kBegins>
  __device__ __forceinline__ float2 part(const Piece& p, int warp, int lane) const {
    const int g = lane / format::kLanesPerRow, c = lane % format::kLanesPerRow;
    int unit = p.first + warp;
    const int64_t at = unit * int64_t{kUnitBytes} + c * int64_t{sizeof(uint4)};
    const char* down = static_cast<const char*>(args.low.down) + (p.rank0 + g) * row_bytes() + at;
    // tokens that do not exist: the last one again, its sums are not used
    const char* acts =
        static_cast<const char*>(args.gemm.params.acts) + min(p.token0 + g, args.gemm.m - 1) * row_bytes() + at;
    float d[2][4] = {};
    bool waited = !kBegins;
#pragma unroll 1
    do {
      uint4 a[kAtOnce], b[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        b[i] = {};
        if (unit + i * kWarps < p.last) b[i] = ptx::load_global_v4(down + i * kStep);
      }
      if (!waited) begin();
      waited = true;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        a[i] = {};
        if (unit + i * kWarps < p.last) a[i] = ptx::load_global_v4(acts + i * kStep);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t low[4] = {a[i].x, 0, a[i].y, 0}, low_down[2] = {b[i].x, b[i].y};
        const uint32_t high[4] = {a[i].z, 0, a[i].w, 0}, high_down[2] = {b[i].z, b[i].w};
        ptx::mma_16<Act>(d[0], low, low_down);
        ptx::mma_16<Act>(d[1], high, high_down);
      }
      unit += kAtOnce * kWarps;
      down += kAtOnce * kStep;
      acts += kAtOnce * kStep;
    } while (unit < p.last);
    return {d[0][0] + d[1][0], d[0][1] + d[1][1]};
  }

  // --- packets -----------------------------------------------------------------------------------------------------------
  __device__ __forceinline__ ptx::Packet* sum_of(int share, int token, int rank) const {
    const LowRankArgs& low = args.low;
    return low.packets + low.num_packets + ((share * args.gemm.m + token) * low.rank + rank) / kSumRanks;
  }
  // The sums of a share: to the block of the last one, which publishes the total.
  __device__ __forceinline__ void send(const Piece& p, float2 sums, int lane) const {
    const int token = p.token0 + lane / format::kLanesPerRow, rank = p.rank0 + 2 * (lane % format::kLanesPerRow);
    const int others = shares() - 1;
    const bool exists = token < args.gemm.m;
    if (p.share < others) {
      if (exists)
        ptx::packet_store(sum_of(p.share, token, rank), {__float_as_uint(sums.x), __float_as_uint(sums.y)},
                          args.low.token);
      return;
    }
    float2 before = {};
    if (exists) before = received(sum_of(0, token, rank), args.gemm.m * args.low.rank / kSumRanks, others);
    publish(p, add(before, sums), lane);
    LowRankCount{args.low}.done(readers(), lane);
  }
  // The sum of the other shares' sums, in their order.
  __device__ __forceinline__ float2 received(ptx::Packet* from, int step, int count) const {
    constexpr int kMost = kMostShares - 1;
    ptx::Packet found[kMost];
    bool all;
    do {
      all = true;
#pragma unroll
      for (int i = 0; i < kMost; ++i)
        if (i < count) found[i] = ptx::packet_load(from + i * step);
#pragma unroll
      for (int i = 0; i < kMost; ++i)
        if (i < count) all &= found[i].tag == args.low.token;
    } while (!all);
    float2 v = {};
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i >= count) break;
      v = add(v, {__uint_as_float(found[i].values.x), __uint_as_float(found[i].values.y)});
      ptx::packet_store(from + i * step, {}, 0);
    }
    return v;
  }
  // t of a group: two lanes have a packet.
  __device__ __forceinline__ void publish(const Piece& p, float2 t, int lane) const {
    const int token = p.token0 + lane / format::kLanesPerRow, rank = p.rank0 + 2 * (lane % format::kLanesPerRow);
    const uint32_t mine = Pair<Act>::of(t.x, t.y), right = __shfl_down_sync(~0u, mine, 1);
    if (token < args.gemm.m && lane % 2 == 0)
      ptx::packet_store(args.low.packets + (token * args.low.rank + rank) / kPacketRanks, {mine, right},
                        args.low.token);
  }
  // A group by one warp, in a block that has waited long.
  __device__ __forceinline__ void alone(int group, int lane) const {
    ptx::grid_dependency_wait();
    float2 t = {};
#pragma unroll 1
    for (int share = 0; share < shares(); ++share) {
      const Piece p = piece(group, share);
      float2 sums = part<false>(p, 0, lane);
#pragma unroll 1
      for (int warp = 1; warp < kWarps; ++warp) sums = add(sums, part<false>(p, warp, lane));
      t = add(t, sums);
    }
    publish(piece(group, 0), t, lane);
  }
};

}  // namespace sparse_marlin::device
