// The low-rank correction inside the decode kernel: out += (acts * down^T) * up^T, for few tokens (plan/low_rank.h).
//
//   project  blocks in front of the grid: 8 tokens x 8 ranks x a share of k each, dense MMAs, operands straight from L2 into registers. Sums
//            leave in packets of two values and a tag
//   receive  in the others, the warp that loads, once it has asked for all of its first output tile, waits for one packet of each of them and
//            copies all into shared memory; those that come later are looked for again
//   expand   at the end of an output tile each warp adds its part of up * t to its sums, as if k were longer: dense MMAs, or, where `up`
//            is packed, sparse ones like those of the weight, a step of 32 columns a warp
//
// All of it runs once in a block, from an instruction cache that has none of it: short code is fast code, so loops of receive
// and expand are not unrolled, other than over registers.
//
// A packet's tag is the launch's random token. The last block that has all packets clears them, so that a launch with the same token, of a
// graph's next replay, finds none. A block waits for blocks of lower number alone, which start before it: however few run at once, those
// it waits for do.
#pragma once
#include "device/mainloop_decode.cuh"
#include "device/ptx/global.cuh"
#include "device/ptx/mma.cuh"
#include "device/ptx/packet.cuh"

namespace sparse_marlin::device {

template <typename Act, TileDecode kTile>
struct LowRankProject {
  // Units of columns that a warp loads at once, as many as the registers hold.
  static constexpr int kAtOnce = kTile.threads() * kTile.blocks > 640 ? 4 : 8;
  static constexpr int kWarps = kTile.warps();
  static constexpr int kUnitBytes = kProjectCols * kActBytes;
  static constexpr int kStep = kWarps * kUnitBytes;  // from a warp's unit to its next

  const KernelArgsDecode& args;
  float2* const sums;  // in shared memory: [warp][lane]
  const int share, rank0, token0;
  const int first, last;  // units of the share

  // All threads of the block; `shared`: its dynamic shared memory.
  static __device__ __forceinline__ void run(const KernelArgsDecode& args, uint8_t* shared) {
    const LowRankArgs& low = args.low;
    const int share = blockIdx.x & ((1 << low.shares_log2) - 1), group = blockIdx.x >> low.shares_log2;
    const int token_block = divide(group, low.rank_blocks_inverse);
    if (token_block * kMmaTokens >= args.gemm.m) return;  // fills a cluster
    const int rank0 = group * kProjectRanks - token_block * low.rank;
    const int units = args.gemm.k / kProjectCols;  // k is a multiple of 64
    const LowRankProject mine{args,
                              reinterpret_cast<float2*>(shared),
                              share,
                              rank0,
                              token_block * kMmaTokens,
                              units * share >> low.shares_log2,
                              units * (share + 1) >> low.shares_log2};
    const int warp = threadIdx.x / format::kLanes, lane = threadIdx.x % format::kLanes;
    if (warp == kWarps) {
      mine.prepare(lane);
    } else {
      mine.project(warp, lane);
    }
    __syncthreads();
    if (warp == 0) mine.publish(lane);
  }

  // The warp without a part in the product.
  __device__ __forceinline__ void prepare(int lane) const {
    if (lane < kProjectRanks && first < last)
      ptx::prefetch_l2(static_cast<const char*>(args.low.down) + (rank0 + lane) * row_bytes() + first * kUnitBytes,
                       (last - first) * kUnitBytes);
    begin();  // the workspace, too, may still be in use by the kernel before
    // Before this block's packets, which come after a barrier: who counts has all packets, so it counts from 0.
    if (blockIdx.x == 0 && lane == 0) {
      *args.low.readers = 0;
      __threadfence();
    }
    __syncwarp();
  }
  static __device__ __forceinline__ void begin() {
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
  }
  __device__ __forceinline__ int64_t row_bytes() const { return int64_t{args.gemm.k} * kActBytes; }

  // Sums of the warp's units: all their operands that the registers hold are asked for before the first is used, `down` before the wait for
  // the kernel before, on which it does not depend. The lanes' columns are neighbours, not those of the MMA's definition: the same for both
  // operands, so that the sum is the same.
  __device__ __forceinline__ void project(int warp, int lane) const {
    const int g = lane / format::kLanesPerRow, c = lane % format::kLanesPerRow;
    int unit = first + warp;
    const int64_t at = unit * int64_t{kUnitBytes} + c * int64_t{sizeof(uint4)};
    const char* down = static_cast<const char*>(args.low.down) + (rank0 + g) * row_bytes() + at;
    // tokens that do not exist: the last one again, its sums are not used
    const char* acts =
        static_cast<const char*>(args.gemm.params.acts) + min(token0 + g, args.gemm.m - 1) * row_bytes() + at;
    float d[2][4] = {};
    bool waited = false;
#pragma unroll 1
    do {
      uint4 a[kAtOnce], b[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        b[i] = {};
        if (unit + i * kWarps < last) b[i] = ptx::load_global_v4(down + i * kStep);
      }
      if (!waited) begin();
      waited = true;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        a[i] = {};
        if (unit + i * kWarps < last) a[i] = ptx::load_global_v4(acts + i * kStep);
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
    } while (unit < last);
    sums[warp * format::kLanes + lane] = {d[0][0] + d[1][0], d[0][1] + d[1][1]};
  }

  // The warps' sums in their order, of tokens x ranks (g, 2c) and (g, 2c + 1).
  __device__ __forceinline__ void publish(int lane) const {
    float2 v = sums[lane];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) {
      const float2 u = sums[i * format::kLanes + lane];
      v = {v.x + u.x, v.y + u.y};
    }
    const int token = token0 + lane / format::kLanesPerRow, rank = rank0 + 2 * (lane % format::kLanesPerRow);
    if (token < args.gemm.m)
      ptx::packet_store(args.low.packets + ((share * args.gemm.m + token) * args.low.rank + rank) / kPacketRanks,
                        {__float_as_uint(v.x), __float_as_uint(v.y)}, args.low.token);
  }
};

// In a block that multiplies.
template <TileDecode kTile, ScaleMode kMode>
struct LowRankPlaces : DecodePlaces<kTile, kMode, true> {
  using Base = DecodePlaces<kTile, kMode, true>;
  using Base::args;
  using Base::smem;

  static constexpr int kAdded = 5;  // barrier: the packets have been added up

  // The first block of a cluster adds the correction for all of it.
  static __device__ __forceinline__ bool corrects() { return ptx::cluster_block() == 0; }

  __device__ __forceinline__ uint32_t up() const { return smem + args.smem.up; }
  __device__ __forceinline__ uint32_t projected() const { return smem + args.smem.projected; }
  __device__ __forceinline__ uint32_t up_full() const { return smem + args.smem.up_full; }
  // The packets lie where the warps' sums will be: they are added up before.
  __device__ __forceinline__ uint32_t packets() const { return smem + args.smem.exchange; }
  __device__ __forceinline__ uint32_t packets_full() const { return smem + args.smem.packets_full; }

  // One thread's: barriers, and the first rows of `up`.
  __device__ __forceinline__ void begin() const {
    ptx::mbarrier_init(up_full(), 1);
    ptx::mbarrier_init(packets_full(), 1);
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

  // All packets into shared memory. Goes on asking for chunks meanwhile, where `asks`.
  __device__ __forceinline__ void run(const Loader& loader, typename Loader::State& asked, bool asks, int lane) const {
    // t is not needed before the tile's end
    if (asks) loader.run_tile(asked);
    __syncwarp();
    while (!all_sent(lane)) {
      if (asks) loader.ask_where_free(asked);
      __syncwarp();
      __nanosleep(kPollNs);  // who looks all the time keeps weights from coming
    }
    if (!asks) return;
    const int bytes = args.low.num_packets * kPacketBytes;
    ptx::fence_async_global();
    ptx::mbarrier_arrive_expect(this->packets_full(), bytes);
    ptx::bulk_load(this->packets(), args.low.packets, bytes, this->packets_full());
  }
  // Whether a packet of every block that projects is there: then the others will be, or almost.
  __device__ __forceinline__ bool all_sent(int lane) const {
    const LowRankArgs& low = args.low;
    bool sent = true;
#pragma unroll 1
    for (int i = lane; i < low.senders; i += format::kLanes) {
      const int group = i >> low.shares_log2, share = i & ((1 << low.shares_log2) - 1);
      const int token_block = divide(group, low.rank_blocks_inverse);
      const int token = token_block * kMmaTokens, rank = group * kProjectRanks - token_block * low.rank;
      sent &= ptx::packet_load(low.packets + ((share * args.gemm.m + token) * low.rank + rank) / kPacketRanks).tag ==
              low.token;
    }
    return __all_sync(~0u, sent);
  }

  // The last block that has all packets clears them.
  __device__ __forceinline__ void done(int lane) const {
    const LowRankArgs& low = args.low;
    bool last = false;
    ptx::named_barrier(Base::kAdded, kTile.threads());
    if (lane == 0) {
      __threadfence();  // the reads of this block are over before another one clears
      last = atomicAdd(low.readers, 1u) == static_cast<uint32_t>(low.num_readers) - 1;
    }
    if (!__shfl_sync(~0u, last, 0)) return;
#pragma unroll 1
    for (int i = lane; i < low.num_packets; i += format::kLanes) ptx::packet_store(low.packets + i, {}, 0);
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

  // t = the sum of its shares, rounded as a dense product's result, by all warps that compute.
  __device__ __forceinline__ void add_shares() const {
    constexpr int kThreads = kTile.warps() * format::kLanes;
    const LowRankArgs& low = args.low;
    const int count = low.num_packets >> low.shares_log2;
    ptx::mbarrier_wait(this->packets_full(), 0);
    int first = threadIdx.x;
    asm volatile("" : "+r"(first));  // as below
#pragma unroll 1
    for (int i = first; i < count; i += kThreads) {
      float2 sum = {};
#pragma unroll 4
      for (int at = i; at < low.num_packets; at += count) {
        const uint4 packet = ptx::load_shared_v4(this->packets() + at * kPacketBytes);
        uint2 v = {packet.x, packet.y};
        if ((uint64_t{packet.w} << 32 | packet.z) != low.token) v = find(at);
        sum = {sum.x + __uint_as_float(v.x), sum.y + __uint_as_float(v.y)};
      }
      const int token = divide(i, low.pairs_inverse);
      // a row of `projected` is longer by its padding
      const int to = i * kPacketRanks + token * (projected_pitch(low.rank) - low.rank);
      ptx::store_shared_32(this->projected() + to * kActBytes, Pair<Act>::of(sum.x, sum.y));
    }
    ptx::named_barrier(kBarrier, kThreads);
    ptx::named_barrier_arrive(Base::kAdded, kTile.threads());
  }
  // A packet that was not there yet when they were copied.
  __device__ __forceinline__ uint2 find(int at) const {
    ptx::Packet packet;
    do {
      packet = ptx::packet_load(args.low.packets + at);
    } while (packet.tag != args.low.token);
    return packet.values;
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
