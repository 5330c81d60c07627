// The Hopper main loop: 4-bit or 8-bit weights as the sparse operand of wgmma.sp. One thread of the producer keeps a ring of stages
// filled; consumer warpgroups turn codes into scaled 16-bit weights in registers, ahead of use, and multiply them with activations
// in shared memory. docs/KERNEL_SM90.md has the drawing and the cycle budget.
//
// A stage is one 128-column tile: acts [half][token][64 columns], row tiles of packed weights as they lie in memory, scales.
// A unit is one wgmma: one panel (64 features) and one step (32 columns). Up to three are in flight while the next is dequantized,
// so there are four buffers of weights. Larger groups of units would have less overhead, but measure slower.
//
// Two rules the compiler does not keep for us (tests/test_sass.py checks both on the machine code):
//   - the metadata register of an unfinished wgmma may be overwritten by ptxas, which tracks operands a and d only: renew().
//   - descriptors must live in uniform registers: loop state is kept warp-uniform and free of indexed constants.
#pragma once
#include "device/dequant.cuh"
#include "device/kernel_args_sm90.cuh"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/cp_async.cuh"
#include "device/ptx/dependent_launch.cuh"
#include "device/ptx/flag.cuh"
#include "device/ptx/hopper.cuh"
#include "device/ptx/mbarrier.cuh"
#include "device/ptx/wgmma_sp.cuh"
#include "device/scheduler.cuh"
#include "plan/smem_sm90.h"

namespace sparse_marlin::device {

inline constexpr int kDescriptorUnit = 16;  // bytes that addresses in descriptors count

// The next stage of the ring and the parity of its phase.
template <int kStages>
struct RingPlace {
  int stage;
  uint32_t parity;
  __device__ __forceinline__ RingPlace next() const {
    const bool wrap = stage + 1 == kStages;
    return {wrap ? 0 : stage + 1, wrap ? parity ^ 1 : parity};
  }
  __device__ __forceinline__ int before() const { return stage == 0 ? kStages - 1 : stage - 1; }
};

// What both sides of the pipeline know: where things lie, and which output tiles the block works on. The blocks of a cluster are
// numbered along features first, then along k.
template <typename Act, int kBits, ShapeSm90 kTile, ScaleMode kMode>
struct PipelineSm90 {
  static constexpr SmemSm90 kSmem = smem_sm90(kTile, kBits, kMode);
  using Place = RingPlace<kSmem.stages>;

  const KernelArgsSm90& args;
  const uint32_t smem;  // 1024-byte aligned

  // Read again wherever they are needed: registers are short. share is 1 or 2.
  __device__ __forceinline__ int share_rank() const { return ptx::cluster_block() & (args.start.share - 1); }
  __device__ __forceinline__ int split() const { return ptx::cluster_block() >> (args.start.share - 1); }
  // The block at `share_rank` among those that share activations with this one, by its number in the cluster.
  __device__ __forceinline__ int sharer(int share_rank) const {
    return (ptx::cluster_block() & -args.start.share) + share_rank;
  }

  __device__ __forceinline__ uint32_t acts_at(int stage) const { return smem + stage * kSmem.acts_bytes; }
  __device__ __forceinline__ uint32_t weights_at(int stage) const {
    return smem + kSmem.weights + stage * kSmem.weights_bytes;
  }
  static constexpr int kScalesOffset = kTile.row_tiles() * kSmem.tile_bytes;  // in weights_at
  __device__ __forceinline__ uint32_t full(int stage) const { return smem + kSmem.full + stage * kBarrierBytes; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return smem + kSmem.empty + stage * kBarrierBytes; }

  __device__ __forceinline__ int tiles() const { return args.start.tiles; }
  __device__ __forceinline__ int cols() const { return args.start.order.cols; }

  // A block's share of the output: first whole tiles, then its range (plan/stream_k.h). What belongs to a tile is worked out again
  // from its number wherever it is needed: registers are short.
  __device__ __forceinline__ int first_tile() const {
    const int tile = ptx::cluster_id();
    return tile < args.start.stream.whole_tiles ? tile : first_of_range();
  }
  __device__ __forceinline__ int next_tile(int tile) const {
    if (!in_range(tile)) {
      tile += ptx::num_clusters();
      return tile < args.start.stream.whole_tiles ? tile : first_of_range();
    }
    return range_col(tile + 1) < args.start.stream.start(range() + 1) ? tile + 1 : tiles();
  }
  // Blocks wait for those with the ranges after theirs: these must have been started before.
  __device__ __forceinline__ int range() const { return gridDim.x - 1 - blockIdx.x; }
  __device__ __forceinline__ bool in_range(int tile) const { return tile >= args.start.stream.whole_tiles; }
  // The tile's first column tile, counted as ranges are.
  __device__ __forceinline__ int range_col(int tile) const { return (tile - args.start.stream.whole_tiles) * cols(); }
  __device__ __forceinline__ int first_of_range() const {
    if (args.start.stream.step == 0) return tiles();
    return args.start.stream.whole_tiles + args.cols.divide(args.start.stream.start(range()));
  }
  __device__ __forceinline__ BlockWork work(int tile) const {
    BlockWork w = args.start.order.work(tile, split());
    if (in_range(tile)) {
      w.first_col = max(0, args.start.stream.start(range()) - range_col(tile));
      w.last_col = min(w.last_col, args.start.stream.start(range() + 1) - range_col(tile));
    }
    return w;
  }
  // Whether the tile's first column tiles are in another block's range, and whether the last ones are but not those.
  __device__ __forceinline__ bool continues(int tile) const {
    return in_range(tile) && args.start.stream.start(range()) > range_col(tile);
  }
  __device__ __forceinline__ bool begins(int tile) const {
    return in_range(tile) && !continues(tile) && args.start.stream.start(range() + 1) < range_col(tile + 1);
  }
  // The ranges after the block's own that have column tiles of `tile`, too.
  template <typename Do>
  __device__ __forceinline__ void for_each_later_range(int tile, const Do& act) const {
    for (int range = this->range() + 1; args.start.stream.start(range) < range_col(tile + 1); ++range) act(range);
  }
  // In the workspace: the sums of a panel of a range, as many bytes as the activations of a stage, and whether they are there.
  __device__ __forceinline__ float* range_sums(int range, int panel) const {
    static_assert(kTile.block_m * format::kTileRows * sizeof(float) == kSmem.acts_bytes);
    return args.gemm.partials + (int64_t{range} * kTile.row_tiles() + panel) * (kTile.block_m * format::kTileRows);
  }
  __device__ __forceinline__ uint64_t* range_flag(int range, int warpgroup) const {
    return args.flags + range * kTile.consumers + warpgroup;
  }
  __device__ __forceinline__ int feature0(const BlockWork& w) const {
    return (w.tile_n * args.start.share + share_rank()) * kTile.block_n();
  }

  __device__ __forceinline__ uint32_t received() const { return smem + kSmem.received; }

  // A thread of each warp: making one ready takes 40 clocks, all of them by one warp would take longer than anything else at the start.
  __device__ __forceinline__ void init_barriers(int warp) const {
    static_assert(kSmem.stages <= kTile.threads() / format::kLanes);
    if (warp < kSmem.stages) {
      ptx::mbarrier_init(full(warp), kMode == ScaleMode::kNone ? 2 : 3);  // the producer's threads
      ptx::mbarrier_init(empty(warp), args.start.share * kTile.consumers * (kWarpgroupThreads / format::kLanes));
    }
    if (kTile.may_split() && warp == 0 && args.start.order.splits > 1) {
      ptx::mbarrier_init(received(), 1);
      ptx::mbarrier_arrive_expect(received(), received_bytes(kTile, args.start.order.splits, split()));
    }
    ptx::mbarrier_init_fence();
  }
};

// Threads that ask for everything, one tensor copy a stage each; what lies past the end of a tensor arrives as zeros. One thread for
// all three would be the bottleneck of tiles with few tokens: a copy takes it some 200 cycles to issue.
template <typename Act, int kBits, ShapeSm90 kTile, ScaleMode kMode>
struct ProducerSm90 : PipelineSm90<Act, kBits, kTile, kMode> {
  using Base = PipelineSm90<Act, kBits, kTile, kMode>;
  using Base::args;
  using Base::kSmem;
  using typename Base::Place;

  // A copy cannot start without its map, so they are asked for first of all. One thread's.
  __device__ __forceinline__ void prefetch_maps() const {
    ptx::prefetch_map(&args.weights_map);
    ptx::prefetch_map(args.start.order.tiles_m > 1 ? &args.acts_map : &args.last_map);
    if (kMode != ScaleMode::kNone) ptx::prefetch_map(&args.scales_map);
  }

  // Three threads, each of which asks for one thing. They find their way through the tiles by the same code, since it is fetched from
  // memory at the start of a launch; the loop over the columns of a tile is each one's own, since a copy takes it some 200 clocks.
  enum Role { kWeights, kActs, kScales, kIdle };

  __device__ __forceinline__ void run(int role) const {
    if (kMode == ScaleMode::kNone && role == kScales) return;
    // Weights depend on no kernel before this one. Scales may be an aligned copy that it made.
    if (role != kWeights) ptx::grid_dependency_wait();
    if (role == kActs) ptx::grid_launch_dependents();
    Place place{0, 1};  // a fresh barrier counts as passed: the first round does not wait
#pragma unroll 1
    for (int tile = this->first_tile(); tile < this->tiles(); tile = this->next_tile(tile)) {
      const BlockWork work = this->work(tile);
      if (role == kWeights) {
        ask_weights(work, place);
      } else if (role == kActs) {
        ask_acts(work, place);
      } else {
        ask_scales(work, place);
      }
      if (!this->begins(tile)) continue;
      this->for_each_later_range(tile, [&](int range) {
#pragma unroll 1
        for (int panel = 0; panel < kTile.row_tiles(); ++panel) {
          ptx::mbarrier_wait(this->empty(place.stage), place.parity);
          if (role == kActs) {
            ask_sums(range, panel, place.stage);
          } else {
            ptx::mbarrier_arrive(this->full(place.stage));
          }
          place = place.next();
        }
      });
    }
  }

  // Calls ask(col, stage, barrier) for each column of the tile, when the stage is free.
  template <typename Ask>
  __device__ __forceinline__ void for_each_col(const BlockWork& work, Place& place, const Ask& ask) const {
#pragma unroll 1
    for (int col = work.first_col; col < work.last_col; ++col) {
      ptx::mbarrier_wait(this->empty(place.stage), place.parity);
      ask(col, place.stage, this->full(place.stage));
      place = place.next();
    }
  }
  __device__ __forceinline__ void ask_weights(const BlockWork& work, Place& place) const {
    const int row_tile = this->feature0(work) / format::kTileRows;
    const uint64_t policy = args.weights_policy;
    for_each_col(work, place, [&](int col, int stage, uint32_t barrier) {
      ptx::mbarrier_arrive_expect(barrier, kTile.row_tiles() * kSmem.tile_bytes);
      ptx::tensor_load_3d(this->weights_at(stage), &args.weights_map, 0, col * (kSmem.tile_bytes / kMapRowBytes),
                          row_tile, barrier, policy);
    });
  }
  __device__ __forceinline__ void ask_scales(const BlockWork& work, Place& place) const {
    const int feature = this->feature0(work);
    for_each_col(work, place, [&](int col, int stage, uint32_t barrier) {
      ptx::mbarrier_arrive_expect(barrier, args.scales_bytes);
      ptx::tensor_load(this->weights_at(stage) + Base::kScalesOffset, &args.scales_map, feature,
                       col * format::kTileCols >> args.gemm.group_shift, barrier);
    });
  }
  // Blocks that share their activations bring each other one half of the columns each.
  __device__ __forceinline__ void ask_acts(const BlockWork& work, Place& place) const {
    static_assert(kMaxShare == kHalves);
    constexpr int kHalfBytes = kTile.block_m * kSwizzleRowBytes;
    constexpr uint16_t kBlocks = (1 << kMaxShare) - 1;
    const int token = work.tile_m * kTile.block_m, own_half = this->share_rank();
    const bool last = work.tile_m == args.start.order.tiles_m - 1;
    const CUtensorMap* const map = last ? &args.last_map : &args.acts_map;
    const uint32_t bytes = last ? kHalves * kSwizzleRowBytes * args.last_tokens : kSmem.acts_bytes;
    for_each_col(work, place, [&](int col, int stage, uint32_t barrier) {
      const uint32_t to = this->acts_at(stage);
      const int column = col * format::kTileCols;
      ptx::mbarrier_arrive_expect(barrier, bytes);
      if (args.start.share > 1) {
        ptx::tensor_load_multicast(to + own_half * kHalfBytes, map, column + own_half * kHalfCols, token, barrier,
                                   kBlocks);
      } else {
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
          ptx::tensor_load(to + half * kHalfBytes, map, column + half * kHalfCols, token, barrier);
      }
    });
  }
  // The sums of a panel of another block's range, into the bytes of a stage's activations.
  __device__ __forceinline__ void ask_sums(int range, int panel, int stage) const {
    if (panel % kTile.panels == 0) {
      uint64_t* const flag = this->range_flag(range, panel / kTile.panels);
      ptx::flag_wait(flag, args.token);
      ptx::flag_clear(flag);
      ptx::fence_async_global();
    }
    ptx::mbarrier_arrive_expect(this->full(stage), kSmem.acts_bytes);
    ptx::bulk_load(this->acts_at(stage), this->range_sums(range, panel), kSmem.acts_bytes, this->full(stage));
  }
};

// A warpgroup that computes kTile.panels panels.
template <typename Act, int kBits, ShapeSm90 kTile, ScaleMode kMode>
struct ConsumerSm90 : PipelineSm90<Act, kBits, kTile, kMode> {
  using Base = PipelineSm90<Act, kBits, kTile, kMode>;
  using Base::args;
  using Base::kSmem;
  using typename Base::Place;
  static constexpr int kPanels = kTile.panels;
  static constexpr int kUnits = kPanels * format::kSliceSteps;
  static constexpr int kBuffers = 4;
  static constexpr int kPending = kBuffers - 2;  // units besides the one just issued
  static_assert(kUnits % kBuffers == 0);         // so that a stage always starts with the first buffer
  static constexpr int kPlaneSteps = format::kSliceSteps * 4 / kBits;  // steps whose codes a lane gets with one load
  using Wgmma = ptx::WgmmaSp<Act, kTile.block_m>;
  using Sums = float[kPanels][kTile.block_m / 2];

  struct Lane {      // of this thread, bytes from the start of a stage's weights
    uint32_t codes;  // of its warpgroup's first panel
    uint32_t meta;
    uint32_t scales;
    uint32_t told;  // where it says that its warp no longer reads the first stage; 0: nowhere
  };
  struct Weights {  // of one column tile and warp, in registers
    uint32_t codes[kPanels][format::kLaneVectorWords];
    uint32_t meta[kPanels][format::kMetaLaneWords];
    uint2 next_meta[kPanels];       // until the registers above are free
    uint32_t scales[kPanels];       // row g in the low half, row g + 8 in the high half
    uint32_t high_scales[kPanels];  // row g + 8, until joined with row g, which waits for both to arrive
  };

  const Lane lane;
  const int warpgroup;

  static __device__ __forceinline__ Lane lane_place(const Base& base, int warpgroup) {
    const int l = threadIdx.x % format::kLanes, warp = threadIdx.x / format::kLanes % format::kTileSlices;
    const uint32_t slice = warpgroup * kPanels * kSmem.tile_bytes + warp * format::slice_bytes(kBits);
    const bool tells =
        l < base.args.start.share;  // every block that shares activations writes into all of them, so all are told
    Lane lane{slice + l * uint32_t{sizeof(uint4)},
              slice + format::slice_code_words(kBits) * format::kWordBytes + l * uint32_t{sizeof(uint2)},
              Base::kScalesOffset +
                  (warpgroup * kPanels * format::kTileRows + warp * format::kSliceRows + l / format::kLanesPerRow) *
                      uint32_t{kActBytes},
              tells ? ptx::remote_address(base.empty(0), base.sharer(l)) : 0};
    // keep them: the compiler would work them out again for every stage
    asm volatile("" : "+r"(lane.codes), "+r"(lane.meta), "+r"(lane.scales), "+r"(lane.told));
    return lane;
  }

  // old = value, but by an instruction that depends on the old content: ptxas then cannot load into the register earlier, while an
  // unfinished wgmma still reads its metadata from it.
  __device__ __forceinline__ void renew(uint32_t& old, uint32_t value) const {
    asm volatile("lop3.b32 %0, %0, %1, %2, 0xEA;" : "+r"(old) : "r"(args.zero), "r"(value));
  }

  __device__ __forceinline__ void load_codes(Weights& w, uint32_t stage, int panel, int plane) const {
    const uint4 v = ptx::load_shared_v4(stage + lane.codes + panel * kSmem.tile_bytes +
                                        plane * format::kLanes * uint32_t{sizeof(uint4)});
    w.codes[panel][0] = v.x;
    w.codes[panel][1] = v.y;
    w.codes[panel][2] = v.z;
    w.codes[panel][3] = v.w;
  }
  __device__ __forceinline__ void load_scales(Weights& w, uint32_t stage, int panel, int step) const {
    const int row = kMode == ScaleMode::kTiles ? 0 : (step * format::kStepCols) >> args.gemm.group_shift;
    const uint32_t at = stage + lane.scales + (row * kTile.block_n() + panel * format::kTileRows) * uint32_t{kActBytes};
    w.scales[panel] = ptx::load_shared_16(at);
    w.high_scales[panel] = ptx::load_shared_16(at + format::kHalfRows * kActBytes);
  }
  static __device__ __forceinline__ void join_scales(Weights& w, int panel) {
    w.scales[panel] |= w.high_scales[panel] << 16;
  }
  // What is needed of a stage before its first unit. It comes while the units before are multiplied: their shared-memory reads make
  // a load slow, and waiting for it was a third of a warpgroup's time.
  __device__ __forceinline__ void load_first(Weights& w, uint32_t stage) const {
#pragma unroll
    for (int b = 0; b < kPanels; ++b) {
      load_codes(w, stage, b, 0);
      if (kMode != ScaleMode::kNone) load_scales(w, stage, b, 0);
      // both words at once: one at a time, half of the lanes would use the same banks as the other half
      w.next_meta[b] = ptx::load_shared_v2(stage + lane.meta + b * kSmem.tile_bytes);
    }
  }
  // A word of metadata, when the units that read the one before are done.
  __device__ __forceinline__ void renew(Weights& w, int word) const {
#pragma unroll
    for (int b = 0; b < kPanels; ++b) renew(w.meta[b][word], word == 0 ? w.next_meta[b].x : w.next_meta[b].y);
  }

  __device__ __forceinline__ void dequantize(ptx::FragA& to, Weights& w, uint32_t stage, int unit) const {
    const int step = unit / kPanels, b = unit % kPanels, word = step % kPlaneSteps;
    if (kMode == ScaleMode::kSteps || (kMode == ScaleMode::kTiles && step == 0)) join_scales(w, b);
    if constexpr (kBits == 4) {
      const uint32_t words[1] = {w.codes[b][word]};
      to = Dequant<Act, kBits>::run(words);
    } else {
      const uint32_t words[2] = {w.codes[b][2 * word], w.codes[b][2 * word + 1]};
      to = Dequant<Act, kBits>::run(words);
    }
    if (kMode != ScaleMode::kNone) apply_packed_scales<Act>(to, w.scales[b]);
    // the panel's next, in the place of what has just been used
    const int next = step + 1;
    if (next < format::kSliceSteps && next % kPlaneSteps == 0) load_codes(w, stage, b, next / kPlaneSteps);
    if (next < format::kSliceSteps && kMode == ScaleMode::kSteps) load_scales(w, stage, b, next);
  }
  __device__ __forceinline__ void multiply(Sums& sums, const ptx::FragA& weights, const Weights& w, uint32_t acts,
                                           int unit) const {
    const int step = unit / kPanels, b = unit % kPanels;
    constexpr int kHalfSteps = format::kSliceSteps / kHalves;
    const uint32_t offset =
        step / kHalfSteps * (kTile.block_m * kSwizzleRowBytes) + step % kHalfSteps * (kSwizzleRowBytes / kHalfSteps);
    const uint64_t from = ptx::descriptor(acts + offset / kDescriptorUnit);
    ptx::wgmma_fence();
    // here problem space becomes instruction space: weights are the sparse operand a, activations are b
    if (step % 2 == 0) {
      Wgmma::template run<0>(sums[b], weights.reg, from, w.meta[b][step / 2]);
    } else {
      Wgmma::template run<1>(sums[b], weights.reg, from, w.meta[b][step / 2]);
    }
    ptx::wgmma_commit();
  }

  // This warp no longer reads the stage.
  __device__ __forceinline__ void release(int stage, uint32_t zero = 0) const {
    if (lane.told != 0) ptx::mbarrier_arrive_remote(lane.told + stage * kBarrierBytes + zero);
  }

  // sums = the product over the columns of `work`; `place` moves on by as many stages.
  __device__ __forceinline__ void run(Sums& sums, Weights& w, const BlockWork& work, Place& place) const {
    ptx::FragA buffers[kBuffers];
#pragma unroll
    for (int b = 0; b < kPanels; ++b)
#pragma unroll
      for (int i = 0; i < kTile.block_m / 2; ++i) sums[b][i] = 0;
    ptx::mbarrier_wait(this->full(place.stage), place.parity);
    load_first(w, this->weights_at(place.stage));
    renew(w, 0);
    dequantize(buffers[0], w, this->weights_at(place.stage), 0);
    // Carried along, so that the compiler does not work it out again from the start of shared memory, a slow special register.
    constexpr int kStageStep = kSmem.acts_bytes / kDescriptorUnit;
    uint32_t acts = ptx::descriptor_low(this->acts_at(place.stage));
    const uint32_t end = acts + (kSmem.stages - place.stage) * kStageStep;
    const int cols = work.last_col - work.first_col;
    for (int i = 0; i < cols; ++i) {
      const Place next = place.next();
      const bool last = i == cols - 1;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        multiply(sums, buffers[u % kBuffers], w, acts, u);
        if (u + 1 < kUnits) {
          dequantize(buffers[(u + 1) % kBuffers], w, this->weights_at(place.stage), u + 1);
        } else if (!last) {
          dequantize(buffers[0], w, this->weights_at(next.stage), 0);
        }
        if (u == kUnits - 2 && !last) {  // codes and scales of this stage have been used
          ptx::mbarrier_wait(this->full(next.stage), next.parity);
          load_first(w, this->weights_at(next.stage));
        }
        ptx::wgmma_wait<kPending>();
        if (u == 1) {  // the last unit of the stage before is done, and with it the users of the second word
          if (i > 0) release(place.before());
          renew(w, 1);
        }
        if (u == kUnits - 1 && !last) renew(w, 0);
      }
      acts += kStageStep;
      if (acts == end) acts -= kSmem.stages * kStageStep;
      place = next;
    }
    ptx::wgmma_wait<0>();
    release(place.before());
  }
};

}  // namespace sparse_marlin::device
