// The low-rank correction inside the decode kernel: out += (acts * down^T) * up^T, for few tokens (plan/low_rank.h).
//
//   project  blocks in front of the grid: 8 ranks x a share of k each, dense MMAs, operands straight from L2 into registers
//   receive  in the others, the warp that loads takes t = acts * down^T from the workspace into shared memory while the rest multiply
//   expand   at the end of an output tile each warp adds its part of up * t to its sums, as if k were longer
//
// A sum travels with a tag, in one 16-byte access: so there is one trip through L2 and nothing to wait for but the sums themselves.
// The tag is random for every launch, so the workspace may hold anything before. A CUDA graph launches with the same tag again and
// again; therefore the last block that has read the packets takes their tags away.
//
// A block waits for blocks of lower number alone, which start before it: however few run at once, those it waits for do.
#pragma once
#include "device/mainloop_decode.cuh"
#include "device/ptx/global.cuh"
#include "device/ptx/mma.cuh"

namespace sparse_marlin::device {

// Of token and rank, in the workspace; a share of k.
__device__ __forceinline__ char* packet_at(const LowRankArgs& low, int unit, int lane) {
  return static_cast<char*>(low.packets) + (unit * format::kLanes + lane) * kPacketBytes;
}

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
    if (rank0 >= padded_rank(low.rank)) return;    // fills a cluster
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
    if (lane < kProjectRanks && rank0 + lane < args.low.rank && first < last)
      ptx::prefetch_l2(down + (rank0 + lane) * row_bytes + first * kUnitBytes, (last - first) * kUnitBytes);
    ptx::grid_dependency_wait();  // the workspace, too, may still be in use by the kernel before
    ptx::grid_launch_dependents();
    if (blockIdx.x == 0 && lane == 0) {
      // In L2 before this block goes on and sends a packet; who counts has seen all packets, so it counts from 0.
      *args.low.readers = 0;
      __threadfence();
    }
    __syncwarp();
  }

  static __device__ __forceinline__ void project(const KernelArgsDecode& args, float4* sums, int warp, int lane,
                                                 int first, int last, int rank0, const char* down, int64_t row_bytes) {
    const int g = lane / format::kLanesPerRow, c = lane % format::kLanesPerRow;
    constexpr int kUnitBytes = kProjectCols * kActBytes, kStep = kWarps * kUnitBytes;
    const int tokens = args.gemm.m;
    // ranks and tokens that do not exist: the last one again, their sums are not used
    const int64_t at = (first + warp) * int64_t{kUnitBytes} + c * int64_t{sizeof(uint4)};
    const char* down_from = down + min(rank0 + g, args.low.rank - 1) * row_bytes + at;
    const char* acts = static_cast<const char*>(args.gemm.params.acts) + at;
    const char* acts_from = acts + min(g, tokens - 1) * row_bytes;
    const char* more_from = acts + min(g + kMmaTokens, tokens - 1) * row_bytes;
    const bool more = tokens > kMmaTokens;

    float d[2][4] = {};
    uint4 next[kAtOnce];
    const auto load_down = [&](int unit) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        next[i] = {};
        if (unit + i * kWarps < last) next[i] = ptx::load_global_v4(down_from + i * kStep);
      }
      down_from += kAtOnce * kStep;
    };
    load_down(first + warp);  // depends on no kernel before this one
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    for (int unit = first + warp; unit < last; unit += kAtOnce * kWarps) {
      Operands o[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const bool exists = unit + i * kWarps < last;
        o[i].down = next[i];
        o[i].acts[0] = o[i].acts[1] = {};
        if (exists) o[i].acts[0] = ptx::load_global_v4(acts_from + i * kStep);
        if (exists && more) o[i].acts[1] = ptx::load_global_v4(more_from + i * kStep);
      }
      acts_from += kAtOnce * kStep;
      more_from += kAtOnce * kStep;
      load_down(unit + kAtOnce * kWarps);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) multiply(d, o[i]);
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
    const int g = lane / format::kLanesPerRow, rank = rank0 + kPacketRanks * (lane % format::kLanesPerRow);
    const auto send = [&](int token, float a, float b) {
      if (token >= args.gemm.m) return;
      const uint32_t low_half = rank < low.rank ? __float_as_uint(a) : 0,
                     high_half = rank + 1 < low.rank ? __float_as_uint(b) : 0;
      const int row = token * packet_rows(low.rank) + rank / kRowRanks;
      ptx::store_packet(packet_at(low, (row << low.shares_log2) + share, rank % kRowRanks / kPacketRanks),
                        {static_cast<uint64_t>(high_half) << 32 | low_half, low.tag});
    };
    send(g, v.x, v.y);
    send(g + kMmaTokens, v.z, v.w);
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
  __device__ __forceinline__ uint32_t projected_full() const { return smem + args.smem.projected_full; }

  // One thread's: barriers, and the first rows of `up`.
  __device__ __forceinline__ void begin() const {
    ptx::mbarrier_init(up_full(), 1);
    ptx::mbarrier_init(projected_full(), 1);
    ptx::mbarrier_init_fence();
    ask_up(this->first_tile());
  }
  // One thread's: the rows of `up` for an output tile, which are one run of bytes. They depend on no kernel before this one.
  __device__ __forceinline__ void ask_up(int tile) const {
    const int n = this->work(tile).tile_n * kTile.block_n(), row_bytes = args.low.rank * kActBytes;
    const char* from = static_cast<const char*>(args.low.up) + int64_t{n} * row_bytes;
    const int bytes = min(kTile.block_n(), args.gemm.n - n) * row_bytes, whole = bytes & ~(kCopyBytes - 1);
    // of rows that do not end at a multiple of 16 bytes, what a bulk copy cannot bring
    for (int i = whole; i < bytes; i += kActBytes)
      ptx::store_shared_16(up() + i, *reinterpret_cast<const uint16_t*>(from + i));
    ptx::mbarrier_arrive_expect(up_full(), whole);
    if (whole > 0) ptx::bulk_load(up(), from, whole, up_full(), ptx::policy_evict_normal());
  }
};

// The warp that loads, between and after its requests.
template <TileDecode kTile, ScaleMode kMode>
struct LowRankReceiver : LowRankPlaces<kTile, kMode> {
  using Base = LowRankPlaces<kTile, kMode>;
  using Base::args;
  using Loader = DecodeLoader<kTile, kMode, true>;
  static constexpr int kUnitBytes = format::kLanes * kPacketBytes;
  // Packets that a lane takes at once, as many as the registers hold; whole shares.
  static constexpr int kAtOnce = kTile.threads() * kTile.blocks > 640 ? 8 : 16;

  // All shares of t, added, into shared memory. Goes on asking for chunks meanwhile, where `asks`.
  __device__ __forceinline__ void run(const Loader& loader, typename Loader::State& asked, bool asks, int lane) const {
    const LowRankArgs& low = args.low;
    const int rows = packet_rows(low.rank), shares = 1 << low.shares_log2;  // rows of a token: 1 or 2
    const int units = args.gemm.m * rows << low.shares_log2;
    const int ranks = padded_rank(low.rank), pitch = projected_pitch(low.rank);
    const bool second = rows > 1;
    // Shares and rows go round in kAtOnce units: which ones unit i is, is the same in every turn.
    static_assert(kAtOnce % (2 * 4) == 0);
    const auto rank_of = [&](int i) {
      return (second && (i >> low.shares_log2 & 1) != 0 ? kRowRanks : 0) + lane * kPacketRanks;
    };
    uint32_t exist = 0;  // a bit for a packet: there are such ranks
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) exist |= static_cast<uint32_t>(rank_of(i) < ranks) << i;
    const char* from = packet_at(low, 0, lane);
    for (int first = 0; first < units; first += kAtOnce, from += kAtOnce * kUnitBytes) {
      const uint32_t wanted = units - first < kAtOnce ? exist & ((1u << (units - first)) - 1) : exist;
      ptx::Packet packets[kAtOnce];
      bool there;
      do {
        if (asks) loader.ask_where_free(asked);
        __syncwarp();
        there = true;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          packets[i] = {0, low.tag};
          if (wanted >> i & 1) packets[i] = ptx::load_packet(from + i * kUnitBytes);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) there &= packets[i].tag == low.tag;
      } while (!__all_sync(~0u, there));
      float2 sum = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float2 v = {__uint_as_float(static_cast<uint32_t>(packets[i].payload)),
                          __uint_as_float(static_cast<uint32_t>(packets[i].payload >> 32))};
        const int share = i & (shares - 1);
        sum = share == 0 ? v : float2{sum.x + v.x, sum.y + v.y};
        if (share == shares - 1 && (wanted >> i & 1) != 0) {
          const int token = (first + i) >> low.shares_log2 >> (second ? 1 : 0);
          ptx::store_shared_v2(this->projected() + (token * pitch + rank_of(i)) * int{sizeof(float)}, sum);
        }
      }
    }
    __syncwarp();
    if (asks) ptx::mbarrier_arrive(this->projected_full());
  }

  // The block has read all packets. The last block to say so takes their tags away.
  __device__ __forceinline__ void done(int lane) const {
    const LowRankArgs& low = args.low;
    bool last = false;
    __syncwarp();
    if (lane == 0) {
      __threadfence();
      last = atomicAdd(low.readers, 1u) == static_cast<uint32_t>(low.num_readers) - 1;
      __threadfence();
    }
    if (!__shfl_sync(~0u, last, 0)) return;
    __syncwarp();
    const int units = args.gemm.m * packet_rows(low.rank) << low.shares_log2;
    for (int unit = 0; unit < units; ++unit) ptx::store_packet(packet_at(low, unit, lane), {0, 0});
  }
};

// A warp that computes: sums += its part of up * t. The warps along k share out the ranks.
template <typename Act, typename Warp, TileDecode kTile, ScaleMode kMode>
struct LowRankExpand : LowRankPlaces<kTile, kMode> {
  using Base = LowRankPlaces<kTile, kMode>;
  using Base::args;
  using Sums = typename Warp::Sums;
  static constexpr int kLaneRanks = kRankUnit / format::kLanesPerRow;  // neighbours

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

  // Four neighbouring ranks of a row of `up`.
  __device__ __forceinline__ void load_up(float (&v)[kLaneRanks], int row, int rank) const {
    const int ranks = args.low.rank;
    const uint32_t at = this->up() + (row * ranks + rank) * kActBytes;
    if (ranks % kLaneRanks == 0) {
      const uint2 pairs = rank < ranks ? ptx::load_shared_v2(at) : uint2{};
      v[0] = Pair<Act>::to_float(pairs.x & 0xFFFF);
      v[1] = Pair<Act>::to_float(pairs.x >> 16);
      v[2] = Pair<Act>::to_float(pairs.y & 0xFFFF);
      v[3] = Pair<Act>::to_float(pairs.y >> 16);
    } else {
#pragma unroll
      for (int j = 0; j < kLaneRanks; ++j)
        v[j] = rank + j < ranks ? Pair<Act>::to_float(ptx::load_shared_16(at + j * kActBytes)) : 0.f;
    }
  }

  // turn: of the block's output tiles
  __device__ __forceinline__ void add(Sums& sums, const Warp& warp, const BlockWork& work, int turn) const {
    if (kMode == ScaleMode::kNone) scale(sums, warp, work.tile_n);
    const int ranks = args.low.rank;
    if (warp.warp_k * kRankUnit >= ranks || !this->corrects()) return;
    int lane = warp.lane;
    asm volatile("" : "+r"(lane));  // nothing below is worked out before the main loop, which has no registers for it
    const int g = lane / format::kLanesPerRow, c = lane % format::kLanesPerRow;
    ptx::mbarrier_wait(this->up_full(), turn & 1);
    ptx::mbarrier_wait(this->projected_full(), 0);
    for (int unit = warp.warp_k * kRankUnit; unit < ranks; unit += kTile.warps_k * kRankUnit) {
      const int rank = unit + c * kLaneRanks;
      // t in two parts of TF32, which are all of its bits but the last; codes and factors of 16 bits are TF32 as they are
      uint32_t high[Warp::kBlocks][kLaneRanks], rest[Warp::kBlocks][kLaneRanks];
#pragma unroll
      for (int q = 0; q < Warp::kBlocks; ++q) {
        const int token = min(work.tile_m * kTile.block_m + q * kMmaTokens + g, args.gemm.m - 1);
        const uint4 t =
            ptx::load_shared_v4(this->projected() + (token * projected_pitch(ranks) + rank) * int{sizeof(float)});
        const float values[kLaneRanks] = {__uint_as_float(t.x), __uint_as_float(t.y), __uint_as_float(t.z),
                                          __uint_as_float(t.w)};
#pragma unroll
        for (int j = 0; j < kLaneRanks; ++j) {
          high[q][j] = ptx::to_tf32(values[j]);
          const float left = values[j] - __uint_as_float(high[q][j]);
          rest[q][j] = isinf(values[j]) ? 0 : ptx::to_tf32(left);  // infinity - infinity
        }
      }
#pragma unroll
      for (int s = 0; s < Warp::kSlices; ++s) {
        const int row = (warp.warp_n * Warp::kSlices + s) * format::kSliceRows + g;
        float a[kLaneRanks], b[kLaneRanks];
        load_up(a, row, rank);
        load_up(b, row + format::kHalfRows, rank);
#pragma unroll
        for (int j = 0; j < kLaneRanks; j += 2) {
          // the ranks of an MMA: a lane's neighbours, the same for both operands
          const uint32_t up[4] = {__float_as_uint(a[j]), __float_as_uint(b[j]), __float_as_uint(a[j + 1]),
                                  __float_as_uint(b[j + 1])};
#pragma unroll
          for (int q = 0; q < Warp::kBlocks; ++q) {
            const uint32_t first[2] = {high[q][j], high[q][j + 1]}, second[2] = {rest[q][j], rest[q][j + 1]};
            ptx::mma_tf32(sums.d[s][q].reg, up, first);
            ptx::mma_tf32(sums.d[s][q].reg, up, second);
          }
        }
      }
    }
  }
};

}  // namespace sparse_marlin::device
