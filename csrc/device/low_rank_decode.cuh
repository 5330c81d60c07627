// The low-rank correction inside the decode kernel: out += (acts * down^T) * up^T, for few tokens (plan/low_rank.h).
//
//   project  blocks of their own: t = acts * down^T, which leaves them in packets (device/project_decode.cuh)
//   receive  in the others, the warp that loads, once it has asked for all of its first output tile, looks for the packets and puts t into
//            shared memory. Where those that project come behind, it does so a while; then it works t out itself, the same to the bit
//   expand   at the end of an output tile each warp adds its part of up * t to its sums, as if k were longer: dense MMAs, or, where `up`
//            is packed, sparse ones like those of the weight, a step of 32 columns a warp
//
// All of it runs once in a block, from an instruction cache that has none of it: short code is fast code, so loops of receive
// and expand are not unrolled, other than over registers.
#pragma once
#include "device/project_decode.cuh"

namespace sparse_marlin::device {

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
    ptx::mbarrier_init(projected_full(), format::kLanes);
    ptx::mbarrier_init_fence();
    ask_up(this->first_tile());
  }
  // One thread's: its block's piece of `down` into L2, for those that project and come behind.
  __device__ __forceinline__ void ask_down() const {
    const uint32_t piece = args.low.down_piece, at = blockIdx.x * piece;
    const uint32_t bytes = static_cast<uint32_t>(args.low.rank) * args.gemm.k * kActBytes;
    if (piece > 0 && at < bytes) ptx::prefetch_l2(static_cast<const char*>(args.low.down) + at, min(piece, bytes - at));
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
template <typename Act, TileDecode kTile, ScaleMode kMode>
struct LowRankReceiver : LowRankPlaces<kTile, kMode> {
  using Base = LowRankPlaces<kTile, kMode>;
  using Base::args;
  using Loader = DecodeLoader<kTile, kMode, true>;

  static constexpr unsigned kPollNs = 100;
  static constexpr int kAtOnce = 4;  // packets that a lane takes

  // t into shared memory. Goes on asking for chunks meanwhile, where `asks`. For lane 0 how many blocks had it before, which takes a while to come.
  __device__ __forceinline__ int run(const Loader& loader, typename Loader::State& asked, bool asks, int lane) const {
    // t is not needed before the tile's end
    if (asks) loader.run_tile(asked);
    __syncwarp();
    const LowRankCount count{args.low};
    bool begun, alone = false;
    int at = lane;  // this lane's next packet
    int looks = args.low.patience;
#pragma unroll 1
    while (true) {
      const int before = at;
      begun = count.has_begun();
      take(at);
      if (__all_sync(~0u, at >= args.low.num_packets)) break;
      if (looks > 0 && --looks == 0) {
        LowRankProject<Act, kTile>::run_alone(args, this->projected(), lane);
        alone = true;
        break;
      }
      if (asks) loader.ask_where_free(asked);
      __syncwarp();
      // hundreds of blocks look at the same bytes, which keeps weights from coming
      if (__all_sync(~0u, at == before)) __nanosleep(kPollNs);
    }
    ptx::mbarrier_arrive(this->projected_full());
    if (lane > 0) return 0;
    int beside = 0;
    if (alone) beside = LowRankCount::kAlone + (count.begin() ? LowRankCount::kBegan : 0);
    while (!begun) begun = count.has_begun();
    return count.add(beside);
  }
  // A lane's next packets, once all of them are there.
  __device__ __forceinline__ void take(int& at) const {
    const LowRankArgs& low = args.low;
    ptx::Packet packets[kAtOnce];
    uint32_t to[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = at + j * format::kLanes;
      packets[j].tag = low.token;
      if (i < low.num_packets) packets[j] = ptx::packet_load(low.packets + i);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = at + j * format::kLanes;
      // a row of `projected` is longer by its padding
      const int value = i * kPacketRanks + divide(i, low.packets_inverse) * (projected_pitch(low.rank) - low.rank);
      to[j] = this->projected() + value * kActBytes;
      asm volatile("" : "+r"(to[j]));  // while the packets are on their way
    }
    bool there = true;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) there &= packets[j].tag == low.token;
    if (!there) return;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (at + j * format::kLanes < low.num_packets) ptx::store_shared_v2(to[j], packets[j].values);
    }
    at += kAtOnce * format::kLanes;
  }
};

// A warp that computes: sums += its part of up * t. The warps along k share out the ranks.
template <typename Act, typename Warp, TileDecode kTile, ScaleMode kMode>
struct LowRankExpand : LowRankPlaces<kTile, kMode> {
  using Base = LowRankPlaces<kTile, kMode>;
  using Base::args;
  using Sums = typename Warp::Sums;

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

  // Two neighbouring ranks of a token.
  __device__ __forceinline__ uint32_t projected_pair(int token, int rank) const {
    return ptx::load_shared_32(this->projected() + (token * projected_pitch(args.low.rank) + rank) * kActBytes);
  }

  // turn: of the block's output tiles
  __device__ __forceinline__ void add(Sums& sums, const Warp& warp, const BlockWork& work, int turn) const {
    if (kMode == ScaleMode::kNone) scale(sums, warp, work.tile_n);
    const int ranks = args.low.rank;
    if (!this->corrects()) return;
    if constexpr (kMode != ScaleMode::kNone) {
      if (this->packed()) {
        add_packed(sums, warp, work, turn);
        return;
      }
    }
    if (warp.warp_k * kRankUnit >= ranks) return;
    ptx::mbarrier_wait(this->projected_full(), 0);
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
      if (rank0 >= ranks) continue;
      ptx::FragA w[Warp::kSlices];
      uint32_t e[Warp::kSlices];
#pragma unroll
      for (int s = 0; s < Warp::kSlices; ++s) {
        const int slice = slice0 + s;
        const uint32_t from = this->up() + ((slice / Base::kRunSlices * args.low.tail + tile) * Base::kRunSlices +
                                            slice % Base::kRunSlices) *
                                               Warp::kSliceBytes;
        w[s] = Warp::codes_of_step(from, lane, step);
        e[s] = ptx::load_shared_32(from + Warp::kMetaOffset + lane * uint32_t{sizeof(uint2)} +
                                   step / 2 * format::kWordBytes);
        // weights before t is there
        asm volatile("" : "+r"(w[s].reg[0]), "+r"(w[s].reg[1]), "+r"(w[s].reg[2]), "+r"(w[s].reg[3]));
      }
      uint32_t t_at[Warp::kBlocks];
#pragma unroll
      for (int q = 0; q < Warp::kBlocks; ++q) {
        const int token = min(token0 + q * kMmaTokens, args.gemm.m - 1);
        t_at[q] = this->projected() + (token * projected_pitch(ranks) + rank0 + 2 * c) * kActBytes;
        asm volatile("" : "+r"(t_at[q]));
      }
      ptx::mbarrier_wait(this->projected_full(), 0);
      ptx::FragB t[Warp::kBlocks];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool exists = rank0 + i * kProjectRanks < ranks;
        const int to = exists ? i * kProjectRanks * kActBytes : 0;
#pragma unroll
        for (int q = 0; q < Warp::kBlocks; ++q) {
          const uint32_t pair = ptx::load_shared_32(t_at[q] + to);
          t[q].reg[i] = exists ? pair : 0;
        }
      }
      const uint32_t group = scales + (at * format::kStepCols >> args.gemm.group_shift) * kTile.block_n() * kActBytes;
#pragma unroll
      for (int s = 0; s < Warp::kSlices; ++s) {
        Sums products;
#pragma unroll
        for (int q = 0; q < Warp::kBlocks; ++q) {
          products.d[s][q] = {};
          if (step % 2 == 0) {
            ptx::mma_sp<Act, 0>(products.d[s][q], w[s], t[q], e[s]);
          } else {
            ptx::mma_sp<Act, 1>(products.d[s][q], w[s], t[q], e[s]);
          }
        }
        warp.template add_scaled<1>(sums, products, group, 0, s);
      }
    }
  }
};

}  // namespace sparse_marlin::device
