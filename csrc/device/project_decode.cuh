// The first factor of a low-rank correction inside the decode kernel: t = acts * down^T (plan/low_rank.h), by blocks of their own, a
// tile's tokens x 8 ranks x a share of k each: dense MMAs, operands straight from L2 into registers. Their sums go to the block of the last
// share, which adds them in the order of the shares; t leaves it in packets of four values and a tag.
//
// A packet's tag is the launch's random token. Who needs it last clears it, so that a launch with the same token, of a graph's next
// replay, finds none. A block waits for blocks of lower number alone, which start before it: however few run at once, those
// it waits for do. Where the blocks that project come behind, those that multiply would wait for blocks of higher number, and could keep them
// from starting for ever while other kernels have all other places: they wait a while, and then do without.
#pragma once
#include "device/mainloop_decode.cuh"
#include "device/ptx/global.cuh"
#include "device/ptx/mma.cuh"
#include "device/ptx/packet.cuh"

namespace sparse_marlin::device {

// Blocks that have t: the last one clears its packets. A fence takes as long as a way to memory and back, so neither t nor the end of the launch
// waits for one: whoever counts has seen that the counter was cleared, and has the values of its packets.
//
// Or has worked them out: then the last one must not clear the packets before they have come. It waits for those that project
// with the one place that it holds; that more launches than an SM has places wait so at once is not to be feared.
struct LowRankCount {
  const LowRankArgs& low;
  // Beside the count: blocks that did without, and, of these, the one that began the count. All that count are on the GPU at once: some
  // hundreds (tests/test_low_rank.py).
  static constexpr int kAlone = 1 << 12, kBegan = 1 << 28;
  static constexpr unsigned kAloneNs = 1000;  // between looks of who waits for late packets

  // In the workspace, behind the counter: the launch whose count has an owner, who begins it; and that it counts from 0.
  __device__ __forceinline__ unsigned long long* owner() const {
    return reinterpret_cast<unsigned long long*>(low.count) + 1;
  }
  __device__ __forceinline__ ptx::Packet* begun() const { return reinterpret_cast<ptx::Packet*>(low.count) + 1; }
  // That the first block that projects has found the count begun.
  __device__ __forceinline__ ptx::Packet* found() const { return begun() + 1; }
  // One thread's, after the wait for the kernel before: of the first block that projects, and where some do without, of any of these. False
  // if another one has begun.
  __device__ __forceinline__ bool begin() const {
    if (low.patience > 0 && atomicExch(owner(), low.token) == low.token) return false;
    *low.count = 0;
    __threadfence();
    ptx::packet_store(begun(), {}, low.token);
    return true;
  }
  __device__ __forceinline__ bool has_begun() const { return ptx::packet_load(begun()).tag == low.token; }
  // One thread's, with what the block has to say beside. How many blocks came before, and what they and this one say.
  __device__ __forceinline__ int add(int beside) const {
    return static_cast<int>(atomicAdd(low.count, 1u + beside)) + beside;
  }
  // A warp's; before: lane 0 has it.
  __device__ __forceinline__ void clear_if_last(int before, int lane) const {
    before = __shfl_sync(~0u, before, 0);
    if (before % kAlone != low.num_readers - 1) return;
#pragma unroll 1
    for (int i = lane; i < low.num_packets; i += format::kLanes) {
      while (before >= kAlone && ptx::packet_load(low.packets + i).tag != low.token) __nanosleep(kAloneNs);
      ptx::packet_store(low.packets + i, {}, 0);
    }
    if (lane > 0) return;
    if (before >= kBegan) {  // or the first block that projects would begin it again
      while (ptx::packet_load(found()).tag != low.token) __nanosleep(kAloneNs);
      ptx::packet_store(found(), {}, 0);
    }
    ptx::packet_store(begun(), {}, 0);
    if (low.patience > 0) *owner() = 0;
  }
};

template <typename Act, TileDecode kTile>
struct LowRankProject {
  // Blocks of 8 tokens: rows g and g + 8 of the MMA's first operand.
  static constexpr int kBlocks = kTile.token_blocks();
  static_assert(kBlocks <= 2);
  // Units of columns that a warp loads at once, as many as the registers hold.
  static constexpr int kAtOnce = kBlocks > 1 || kTile.threads() * kTile.blocks > 640 ? 4 : 8;
  static constexpr int kSums = 4;
  static constexpr int kProjected = 1;  // barrier: of the warps that project
  static constexpr int kWarps = kTile.warps();
  static constexpr int kUnitBytes = kProjectCols * kActBytes;
  static constexpr int kStep = kWarps * kUnitBytes;  // from a warp's unit to its next
  static_assert(kWarps >= kMostShares - 1 && kWarps >= kBlocks);
  // what the block has of shared memory, whatever the plan
  static_assert(2 * kBlocks * format::kLanes * int{sizeof(float2)} <=
                kMinStagesDecode * kTile.turn_cols * kTile.slices * format::slice_bytes(4));

  const KernelArgsDecode& args;
  // In shared memory, [block of tokens][warp][lane], twice: of the block's warps, of the other shares.
  float2* const sums;
  const int share, rank0, token0;

  // Units of the share: from this to that of the next one.
  __device__ __forceinline__ int first_unit(int share) const {
    return args.gemm.k / kProjectCols * share >> args.low.shares_log2;  // k is a multiple of 64
  }

  // All threads of block `index` of those that project; `shared`: its dynamic shared memory.
  static __device__ __forceinline__ void run(const KernelArgsDecode& args, int index, uint8_t* shared) {
    const LowRankArgs& low = args.low;
    const int share = index & ((1 << low.shares_log2) - 1), group = index >> low.shares_log2;
    const int tile_m = divide(group, low.rank_blocks_inverse);
    if (tile_m * kTile.block_m >= args.gemm.m) return;  // fills a cluster
    const int rank0 = group * kProjectRanks - tile_m * low.rank;
    const LowRankProject mine{args, reinterpret_cast<float2*>(shared), share, rank0, tile_m * kTile.block_m};
    const int warp = threadIdx.x / format::kLanes, lane = threadIdx.x % format::kLanes;
    if (warp == kWarps) {
      mine.prepare(index, lane);
      return;
    }
    mine.project(warp, lane);
    mine.finish(warp, lane);
  }

  // The warp without a part in the product.
  __device__ __forceinline__ void prepare(int index, int lane) const {
    const int first = first_unit(share), last = first_unit(share + 1);
    if (lane < kProjectRanks && first < last)
      ptx::prefetch_l2(static_cast<const char*>(args.low.down) + (rank0 + lane) * row_bytes() + first * kUnitBytes,
                       (last - first) * kUnitBytes);
    begin();  // the workspace, too, may still be in use by the kernel before
    const LowRankCount count{args.low};
    if (index == 0 && lane == 0 && !count.begin()) ptx::packet_store(count.found(), {}, args.low.token);
  }
  static __device__ __forceinline__ void begin() {
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
  }
  __device__ __forceinline__ int64_t row_bytes() const { return int64_t{args.gemm.k} * kActBytes; }

  // A warp's sums, for the block to add.
  __device__ __forceinline__ void project(int warp, int lane) const {
    const auto wait = [] { begin(); };
    float2 v[kBlocks];
    sum<kAtOnce>(share, warp, lane, wait, v);
#pragma unroll
    for (int q = 0; q < kBlocks; ++q) sums_at(q, warp)[lane] = v[q];
  }
  // Sums of the warp's units of a share: all their operands that the registers hold are asked for before the first is used, `down` before the wait for
  // the kernel before, on which it does not depend. The lanes' columns are neighbours, not those of the MMA's definition: the same for both
  // operands, so that the sum is the same; it is, too, however many units are loaded at once, an even number.
  template <int kUnits, typename Wait>
  __device__ __forceinline__ void sum(int share, int warp, int lane, const Wait& wait, float2 (&v)[kBlocks]) const {
    const int g = lane / format::kLanesPerRow, c = lane % format::kLanesPerRow, last = first_unit(share + 1);
    int unit = first_unit(share) + warp;
    const int64_t at = unit * int64_t{kUnitBytes} + c * int64_t{sizeof(uint4)};
    const char* down = static_cast<const char*>(args.low.down) + (rank0 + g) * row_bytes() + at;
    const char* acts[kBlocks];
#pragma unroll
    for (int q = 0; q < kBlocks; ++q) {
      // tokens that do not exist: the last one again, its sums are not used
      const int token = min(token0 + q * kMmaTokens + g, args.gemm.m - 1);
      acts[q] = static_cast<const char*>(args.gemm.params.acts) + token * row_bytes() + at;
    }
    float d[kSums][4] = {};  // an MMA waits for the one before it with the same sums
    bool waited = false;
#pragma unroll 1
    do {
      uint4 a[kUnits][kBlocks], b[kUnits];
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        b[i] = {};
        if (unit + i * kWarps < last) b[i] = ptx::load_global_v4(down + i * kStep);
      }
      if (!waited) wait();
      waited = true;
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
#pragma unroll
        for (int q = 0; q < kBlocks; ++q) {
          a[i][q] = {};
          if (unit + i * kWarps < last) a[i][q] = ptx::load_global_v4(acts[q] + i * kStep);
        }
      }
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        uint4 other = {};
        if (kBlocks > 1) other = a[i][kBlocks - 1];
        const uint4& a0 = a[i][0];
        const uint32_t low[4] = {a0.x, other.x, a0.y, other.y}, low_down[2] = {b[i].x, b[i].y};
        const uint32_t high[4] = {a0.z, other.z, a0.w, other.w}, high_down[2] = {b[i].z, b[i].w};
        ptx::mma_16<Act>(d[2 * i % kSums], low, low_down);
        ptx::mma_16<Act>(d[(2 * i + 1) % kSums], high, high_down);
      }
      unit += kUnits * kWarps;
      down += kUnits * kStep;
#pragma unroll
      for (int q = 0; q < kBlocks; ++q) acts[q] += kUnits * kStep;
    } while (unit < last);
#pragma unroll
    for (int q = 0; q < kBlocks; ++q) {
      v[q] = {d[0][2 * q] + d[1][2 * q] + (d[2][2 * q] + d[3][2 * q]),
              d[0][2 * q + 1] + d[1][2 * q + 1] + (d[2][2 * q + 1] + d[3][2 * q + 1])};
    }
  }

  __device__ __forceinline__ float2* sums_at(int block, int warp) const {
    return sums + (block * kWarps + warp) * format::kLanes;
  }
  __device__ __forceinline__ float2* others_at(int block, int share) const { return sums_at(kBlocks + block, share); }
  static __device__ __forceinline__ float2 add(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }

  // The warps' sums in their order, of tokens x ranks (g, 2c) and (g, 2c + 1), by a warp for each block of tokens: to the block of the last
  // share, which adds the shares and publishes the total. That those who multiply add the shares instead saves a way through memory, and
  // costs as much as they look at more packets.
  __device__ __forceinline__ void finish(int warp, int lane) const {
    const LowRankArgs& low = args.low;
    const int others = (1 << low.shares_log2) - 1;
    // the share whose sums this warp takes; the warps that add take the last ones, if any
    const int from = kWarps - 1 - warp;
    const int rank = rank0 + 2 * (lane % format::kLanesPerRow), token = token0 + lane / format::kLanesPerRow;
    const auto sums_of = [&](int share, int q) {
      const int share_packets = args.gemm.m * low.rank / kSumRanks;
      return low.packets + low.num_packets + share * share_packets +
             ((token + q * kMmaTokens) * low.rank + rank) / kSumRanks;
    };
    const auto exists = [&](int q) { return token + q * kMmaTokens < args.gemm.m; };
    const bool takes = share == others && from < others;
    ptx::Packet* of_share[kBlocks];
#pragma unroll
    for (int q = 0; q < kBlocks; ++q) {
      of_share[q] = takes && exists(q) ? sums_of(from, q) : nullptr;
      asm volatile("" : "+l"(of_share[q]));  // before the wait
    }
    ptx::named_barrier(kProjected, kWarps * format::kLanes);
    float2 v = {};
    if (warp < kBlocks) {
      v = sums_at(warp, 0)[lane];
#pragma unroll
      for (int i = 1; i < kWarps; ++i) v = add(v, sums_at(warp, i)[lane]);
    }
    if (share < others) {
      if (warp < kBlocks && exists(warp))
        ptx::packet_store(sums_of(share, warp), {__float_as_uint(v.x), __float_as_uint(v.y)}, low.token);
      return;
    }
    if (others > 0) {
      if (takes) {
        float2 taken[kBlocks];
        take(of_share, taken);
#pragma unroll
        for (int q = 0; q < kBlocks; ++q) others_at(q, from)[lane] = taken[q];
      }
      ptx::named_barrier(kProjected, kWarps * format::kLanes);
    }
    if (warp >= kBlocks) return;
    if (others > 0) {
      float2 each[kMostShares - 1];
#pragma unroll
      for (int i = 0; i < kMostShares - 1; ++i)
        if (i < others) each[i] = others_at(warp, i)[lane];
      float2 before = each[0];
#pragma unroll
      for (int i = 1; i < kMostShares - 1; ++i)
        if (i < others) before = add(before, each[i]);
      v = add(before, v);
    }
    const uint32_t mine = Pair<Act>::of(v.x, v.y);
    const uint32_t right = __shfl_down_sync(~0u, mine, 1);
    if (exists(warp) && lane % 2 == 0)
      ptx::packet_store(low.packets + ((token + warp * kMmaTokens) * low.rank + rank) / kPacketRanks, {mine, right},
                        low.token);
  }
  // Nobody else reads these packets. They are looked for together: one after the other each would be a way to L2 and back.
  __device__ __forceinline__ void take(ptx::Packet* const (&of_sums)[kBlocks], float2 (&sums)[kBlocks]) const {
    ptx::Packet found[kBlocks];
    bool there;
    do {
#pragma unroll
      for (int q = 0; q < kBlocks; ++q) {
        found[q] = {{}, args.low.token};
        if (of_sums[q] != nullptr) found[q] = ptx::packet_load(of_sums[q]);
      }
      there = true;
#pragma unroll
      for (int q = 0; q < kBlocks; ++q) there &= found[q].tag == args.low.token;
    } while (!there);
#pragma unroll
    for (int q = 0; q < kBlocks; ++q) {
      if (of_sums[q] != nullptr) ptx::packet_store(of_sums[q], {}, 0);
      sums[q] = {__uint_as_float(found[q].values.x), __uint_as_float(found[q].values.y)};
    }
  }

  // All of t by one warp of a block that multiplies, into its shared memory, [token][rank + padding]: the sums of all warps of all shares, added
  // in the same order. It takes milliseconds (inferred).
  static __device__ __forceinline__ void run_alone(const KernelArgsDecode& args, uint32_t projected, int lane) {
    const int shares = 1 << args.low.shares_log2;
    const auto waited = [] {};
#pragma unroll 1
    for (int token0 = 0; token0 < args.gemm.m; token0 += kTile.block_m) {
#pragma unroll 1
      for (int rank0 = 0; rank0 < args.low.rank; rank0 += kProjectRanks) {
        const LowRankProject mine{args, nullptr, 0, rank0, token0};
        float2 total[kBlocks], of_share[kBlocks];
#pragma unroll 1
        for (int i = 0; i < shares * kWarps; ++i) {
          const int warp = i % kWarps;
          float2 v[kBlocks];
          mine.template sum<2>(i / kWarps, warp, lane, waited, v);  // few units at once, for few registers
#pragma unroll
          for (int q = 0; q < kBlocks; ++q) {
            of_share[q] = warp == 0 ? v[q] : add(of_share[q], v[q]);
            if (warp == kWarps - 1) total[q] = i < kWarps ? of_share[q] : add(total[q], of_share[q]);
          }
        }
        const int rank = rank0 + 2 * (lane % format::kLanesPerRow), token = token0 + lane / format::kLanesPerRow;
#pragma unroll
        for (int q = 0; q < kBlocks; ++q) {
          const uint32_t pair = Pair<Act>::of(total[q].x, total[q].y), right = __shfl_down_sync(~0u, pair, 1);
          const int row = token + q * kMmaTokens;
          if (row < args.gemm.m && lane % 2 == 0)
            ptx::store_shared_v2(projected + (row * projected_pitch(args.low.rank) + rank) * kActBytes, {pair, right});
        }
      }
    }
  }
};

}  // namespace sparse_marlin::device
