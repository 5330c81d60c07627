// What the warps of a block of the decode kernel share, and the warp that brings it: activations and scales, in chunks.
#pragma once
#include "device/kernel_args_decode.cuh"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/dependent_launch.cuh"
#include "device/ptx/hopper.cuh"
#include "device/ptx/mbarrier.cuh"
#include "device/scheduler.cuh"

namespace sparse_marlin::device {

// Where the next stage or chunk of a ring lies, and its barrier; the parity of the phase flips with every round.
struct RingPlace {
  uint32_t at;
  uint32_t barrier;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(uint32_t bytes, uint32_t start, uint32_t first_barrier, int count) {
    at += bytes;
    barrier += kBarrierBytes;
    if (barrier == first_barrier + count * kBarrierBytes) {
      at = start;
      barrier = first_barrier;
      parity ^= 1;
    }
  }
};

// Where things lie, and which output tiles the block works on.
// kLowRank: with a low-rank correction (device/low_rank_decode.cuh), whose blocks that project take no part in what follows.
template <TileDecode kTile, ScaleMode kMode, bool kLowRank>
struct DecodePlaces {
  static constexpr bool kScaled = kMode != ScaleMode::kNone;
  const KernelArgsDecode& args;
  const uint32_t smem;  // 1024-byte aligned

  // Where k is split, a cluster works on one output tile, and its blocks share out the column tiles of a turn; otherwise a block is a
  // cluster of its own, and walks over output tiles.
  __device__ __forceinline__ int first_tile() const {
    const int cluster = args.start.splits == 1 ? static_cast<int>(blockIdx.x) : ptx::cluster_id();
    if constexpr (kLowRank) return cluster - args.low.first_cluster;
    return cluster;
  }
  // From one output tile of a block to its next.
  __device__ __forceinline__ int step() const {
    if constexpr (kLowRank) return args.low.step;
    return gridDim.x;
  }
  __device__ __forceinline__ int first_col() const {
    return args.start.splits == 1 ? 0 : ptx::cluster_block() * kTile.warps_k;
  }

  __device__ __forceinline__ BlockWork work(int tile) const {
    return work_of_neighbours(tile, args.start.tiles_m, args.start.tiles_m_inverse, args.start.cols);
  }
  __device__ __forceinline__ RingPlace first_chunk() const { return {smem, smem + args.smem.chunk_full}; }
  __device__ __forceinline__ void advance(RingPlace& chunk) const {
    chunk.advance(args.smem.chunk_bytes, smem, smem + args.smem.chunk_full, args.smem.chunks);
  }
  __device__ __forceinline__ void init_chunk(uint32_t full) const {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(empty(full), kTile.warps());
  }
  // Of the chunk whose `full` barrier is given.
  __device__ __forceinline__ uint32_t empty(uint32_t full) const { return full + args.smem.chunks * kBarrierBytes; }

  // The kernel before has ended, and the first chunk is asked for.
  __device__ __forceinline__ uint32_t started() const { return smem + args.smem.started; }
  __device__ __forceinline__ uint32_t received_full() const { return smem + args.smem.received_full; }
  // Of the tile's vectors, those that block `rank` of the splits owns.
  __device__ __forceinline__ int owned_vectors(int rank) const {
    const int vectors = args.smem.rows * (kTile.block_n() / kVectorFeatures);
    return divide(vectors - rank + args.start.splits - 1, args.splits_inverse);
  }
};

// The warp that brings what the others share, a chunk at a time; one thread of it asks.
template <TileDecode kTile, ScaleMode kMode, bool kLowRank>
struct DecodeLoader : DecodePlaces<kTile, kMode, kLowRank> {
  using Base = DecodePlaces<kTile, kMode, kLowRank>;
  using Base::args;
  using Base::smem;

  struct State {
    int tile;
    int col;
    int left;  // chunks of the tile
    int token0, feature0;
    RingPlace chunk;
  };
  __device__ __forceinline__ void begin_tile(State& s, int tile) const {
    s.tile = tile;
    if (tile >= args.start.tiles) return;
    const BlockWork work = this->work(tile);
    s.token0 = work.tile_m * kTile.block_m;
    s.feature0 = work.tile_n * kTile.block_n();
    s.col = this->first_col();
    s.left = args.start.turns * kTile.turn_cols;
  }
  __device__ __forceinline__ void ask(State& s) const {
    // boxes are always whole: what is past the end arrives as zeros
    ptx::mbarrier_arrive_expect(s.chunk.barrier, args.smem.copied_bytes);
    ptx::tensor_load_3d(s.chunk.at, &args.acts_map, 0, s.token0, s.col * kHalves, s.chunk.barrier);
    if (Base::kScaled) {
      ptx::tensor_load(s.chunk.at + args.smem.scales, &args.scales_map, s.feature0,
                       s.col * format::kTileCols >> args.gemm.group_shift, s.chunk.barrier);
    }
    this->advance(s.chunk);
    s.col += args.start.col_step;
    if (--s.left == 0) begin_tile(s, s.tile + this->step());
  }

  // One thread's: its barriers, and those of the first chunk; the warps that compute make the others' ready.
  __device__ __forceinline__ State prepare() const {
    State s;
    s.chunk = this->first_chunk();
    this->init_chunk(s.chunk.barrier);
    ptx::mbarrier_init(this->started(), 1);
    ptx::mbarrier_init_fence();
    begin_tile(s, this->first_tile());
    return s;
  }
  // One thread's. The first chunk, while the other warps ask for their weights: copies are served in the order in which they were
  // asked for, and behind all weights it would be the last to arrive.
  __device__ __forceinline__ void begin(State& s) const {
    ptx::grid_dependency_wait();
    // what walks has all places for blocks: the next kernel's come as these end
    if (args.start.tiles > this->step()) ptx::grid_launch_dependents();
    if (s.tile < args.start.tiles) ask(s);
    ptx::mbarrier_arrive(this->started());
  }
  // What the blocks of the cluster will send.
  __device__ __forceinline__ void expect_sums() const {
    const int vectors = this->owned_vectors(ptx::cluster_block());
    ptx::mbarrier_init(this->received_full(), 1);
    ptx::mbarrier_arrive_expect(this->received_full(), (args.gemm.splits - 1) * vectors * kVectorBytes);
    ptx::mbarrier_init_fence();
  }
  // What the ring has room for now.
  __device__ __forceinline__ void ask_where_free(State& s) const {
    while (s.tile < args.start.tiles && ptx::mbarrier_test(this->empty(s.chunk.barrier), s.chunk.parity ^ 1)) ask(s);
  }
  // All of the output tile that is begun.
  __device__ __forceinline__ void run_tile(State& s) const {
    const int tile = s.tile;
    while (s.tile == tile && tile < args.start.tiles) {
      ptx::mbarrier_wait(this->empty(s.chunk.barrier), s.chunk.parity ^ 1);
      ask(s);
    }
  }
  __device__ __forceinline__ void run(State& s) const {
    while (s.tile < args.start.tiles) {
      ptx::mbarrier_wait(this->empty(s.chunk.barrier), s.chunk.parity ^ 1);
      ask(s);
    }
  }
  // One thread's, behind its last request: its block's pieces of what is read next. Without it the memory rests from here until the next
  // multiplication asks, which may have norms or attention before it.
  __device__ __forceinline__ void ask_next() const {
    constexpr uint32_t kPiece = 4 << 10;
    const uint32_t first = kLowRank ? args.low.first_cluster * args.start.splits : 0, step = this->step() * kPiece;
#pragma unroll 1
    for (uint32_t at = (blockIdx.x - first) * kPiece; at < args.next.bytes; at += step)
      ptx::bulk_prefetch(args.next.start + at, min(kPiece, args.next.bytes - at));
  }
};

}  // namespace sparse_marlin::device
