// The Hopper main loop: 4-bit or 8-bit weights as the sparse operand of wgmma.sp. One thread of the producer keeps a ring of stages
// filled; consumer warpgroups turn codes into scaled 16-bit weights in registers, ahead of use, and multiply them with activations
// in shared memory. docs/KERNEL_SM90.md has the drawing and the cycle budget.
//
// A stage is one 128-column tile: acts [half][token][64 columns], row tiles of packed weights as they lie in memory, scales.
// A unit is one wgmma: one panel (64 features) and one step (32 columns). Up to three units are in flight while the next is
// dequantized, so there are four fragment buffers.
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
};

// What both sides of the pipeline know: where things lie, and which output tiles the block works on.
template <typename Act, int kBits, TileSm90 kTile, ScaleMode kMode>
struct PipelineSm90 {
  static constexpr SmemSm90 kSmem = smem_sm90(kTile, kBits, kMode);
  static constexpr int kTokens = kTile.block_m;
  static constexpr int kCluster = kTile.cluster;
  using Place = RingPlace<kSmem.stages>;

  const KernelArgsSm90& args;
  const uint32_t smem;  // 1024-byte aligned
  const int rank;       // of the block in its cluster

  __device__ __forceinline__ uint32_t acts_at(int stage) const { return smem + stage * kSmem.acts_bytes; }
  __device__ __forceinline__ uint32_t weights_at(int stage) const {
    return smem + kSmem.weights + stage * kSmem.weights_bytes;
  }
  static constexpr int kScalesOffset = kTile.row_tiles() * kSmem.tile_bytes;  // in weights_at
  __device__ __forceinline__ uint32_t full(int stage) const { return smem + kSmem.full + stage * kBarrierBytes; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return smem + kSmem.empty + stage * kBarrierBytes; }

  __device__ __forceinline__ int first_item() const { return blockIdx.x / kCluster; }
  __device__ __forceinline__ int item_step() const { return gridDim.x / kCluster; }
  __device__ __forceinline__ int items() const { return args.gemm.tiles_m * args.gemm.tiles_n * args.gemm.splits; }
  __device__ __forceinline__ BlockWork work(int item) const {
    return block_work(item, args.gemm.tiles_m, args.gemm.tiles_n, args.gemm.splits, format::col_tiles(args.gemm.k));
  }
  __device__ __forceinline__ int feature0(const BlockWork& w) const {
    return (w.tile_n * kCluster + rank) * kTile.block_n();
  }

  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < kSmem.stages; ++i) {
      ptx::mbarrier_init(full(i), 1);
      ptx::mbarrier_init(empty(i), kCluster * kTile.consumers * (kWarpgroupThreads / format::kLanes));
    }
    ptx::mbarrier_init_fence();
  }
};

// One thread that asks for everything: three tensor copies a stage. What lies past the end of a tensor arrives as zeros.
template <typename Act, int kBits, TileSm90 kTile, ScaleMode kMode>
struct ProducerSm90 : PipelineSm90<Act, kBits, kTile, kMode> {
  using Base = PipelineSm90<Act, kBits, kTile, kMode>;
  using Base::args;
  using Base::kSmem;
  using typename Base::Place;

  __device__ __forceinline__ void load_weights(const BlockWork& work, int col, int stage, uint64_t policy) const {
    const KernelArgs& g = args.gemm;
    const uint32_t to = this->weights_at(stage), barrier = this->full(stage);
    const int feature0 = this->feature0(work);
    ptx::mbarrier_arrive_expect(barrier, args.stage_bytes);
    ptx::tensor_load_3d(to, &args.weights_map, 0, col * (kSmem.tile_bytes / kMapRowBytes), feature0 / format::kTileRows,
                        barrier, policy);
    if (kMode == ScaleMode::kNone) return;
    ptx::tensor_load(to + Base::kScalesOffset, &args.scales_map, feature0, col * format::kTileCols >> g.group_shift,
                     barrier);
  }

  // The halves of the columns are shared out over the blocks of a cluster; each brings its own to all of them.
  __device__ __forceinline__ void load_acts(const BlockWork& work, int col, int stage) const {
    const uint32_t barrier = this->full(stage);
    const int token = work.tile_m * kTile.block_m;
    static_assert(Base::kCluster == 1 || Base::kCluster == kHalves);
#pragma unroll
    for (int i = 0; i < kHalves / Base::kCluster; ++i) {
      const int half = this->rank + i;
      const uint32_t to = this->acts_at(stage) + half * kTile.block_m * kSwizzleRowBytes;
      const int column = col * format::kTileCols + half * kHalfCols;
      if constexpr (Base::kCluster > 1) {
        ptx::tensor_load_multicast(to, &args.acts_map, column, token, barrier, (1 << Base::kCluster) - 1);
      } else {
        ptx::tensor_load(to, &args.acts_map, column, token, barrier);
      }
    }
  }

  __device__ __forceinline__ void run() const {
    ptx::prefetch_map(&args.weights_map);
    ptx::prefetch_map(&args.acts_map);
    // weights that one row of blocks reads must not push activations out of L2
    const uint64_t policy = args.gemm.tiles_m == 1 ? ptx::policy_evict_first() : ptx::policy_evict_normal();
    // Weights never depend on the kernel before this one: fill the ring with them before waiting for it.
    int ahead = 0;
    if (this->first_item() < this->items()) {
      const BlockWork work = this->work(this->first_item());
      for (; ahead < kSmem.stages && work.first_col + ahead < work.last_col; ++ahead) {
        load_weights(work, work.first_col + ahead, ahead, policy);
      }
    }
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    Place place{0, 1};  // a fresh barrier counts as passed: the first round does not wait
    for (int item = this->first_item(); item < this->items(); item += this->item_step()) {
      const BlockWork work = this->work(item);
      for (int col = work.first_col; col < work.last_col; ++col) {
        if (ahead > 0) {
          --ahead;
        } else {
          ptx::mbarrier_wait(this->empty(place.stage), place.parity);
          load_weights(work, col, place.stage, policy);
        }
        load_acts(work, col, place.stage);
        place = place.next();
      }
    }
  }
};

// A warpgroup that computes kTile.panels panels.
template <typename Act, int kBits, TileSm90 kTile, ScaleMode kMode>
struct ConsumerSm90 : PipelineSm90<Act, kBits, kTile, kMode> {
  using Base = PipelineSm90<Act, kBits, kTile, kMode>;
  using Base::args;
  using Base::kSmem;
  using typename Base::Place;
  static constexpr int kPanels = kTile.panels;
  static constexpr int kUnits = kPanels * format::kSliceSteps;
  static constexpr int kBuffers = 4;
  static constexpr int kInFlight = kBuffers - 2;                       // besides the unit just issued
  static constexpr int kPlaneSteps = format::kSliceSteps * 4 / kBits;  // steps whose codes a lane gets with one load
  using Wgmma = ptx::WgmmaSp<Act, kTile.block_m>;
  using Sums = float[kPanels][kTile.block_m / 2];

  struct Lane {      // of this thread, bytes from the start of a stage's weights
    uint32_t codes;  // of its warpgroup's first panel
    uint32_t meta;
    uint32_t scales;
  };
  struct Weights {  // of one column tile and warp, in registers
    uint32_t codes[kPanels][format::kLaneVectorWords];
    uint32_t meta[kPanels][format::kMetaLaneWords];
    uint32_t next_meta[kPanels];  // the second word, until its register is free
    uint32_t scales[kPanels];     // row g in the low half, row g + 8 in the high half
  };

  const Lane lane;
  const int warpgroup;

  static __device__ __forceinline__ Lane lane_place(int warpgroup) {
    const int l = threadIdx.x % format::kLanes, warp = threadIdx.x / format::kLanes % format::kTileSlices;
    const uint32_t slice = warpgroup * kPanels * kSmem.tile_bytes + warp * format::slice_bytes(kBits);
    return {slice + l * uint32_t{sizeof(uint4)},
            slice + format::slice_code_words(kBits) * format::kWordBytes + l * uint32_t{sizeof(uint2)},
            Base::kScalesOffset +
                (warpgroup * kPanels * format::kTileRows + warp * format::kSliceRows + l / format::kLanesPerRow) *
                    uint32_t{kActBytes}};
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
    w.scales[panel] = ptx::load_shared_16(at) | ptx::load_shared_16(at + format::kHalfRows * kActBytes) << 16;
  }
  // What is needed of a stage before its first unit.
  __device__ __forceinline__ void load_first(Weights& w, uint32_t stage) const {
#pragma unroll
    for (int b = 0; b < kPanels; ++b) {
      load_codes(w, stage, b, 0);
      const uint2 meta = ptx::load_shared_v2(stage + lane.meta + b * kSmem.tile_bytes);
      renew(w.meta[b][0], meta.x);
      w.next_meta[b] = meta.y;
      if (kMode == ScaleMode::kTiles) load_scales(w, stage, b, 0);
    }
  }

  __device__ __forceinline__ void dequantize(ptx::FragA& to, Weights& w, uint32_t stage, int unit) const {
    const int step = unit / kPanels, b = unit % kPanels, word = step % kPlaneSteps;
    if (word == 0 && step > 0) load_codes(w, stage, b, step / kPlaneSteps);
    if (kMode == ScaleMode::kSteps) load_scales(w, stage, b, step);
    if constexpr (kBits == 4) {
      const uint32_t words[1] = {w.codes[b][word]};
      to = Dequant<Act, kBits>::run(words);
    } else {
      const uint32_t words[2] = {w.codes[b][2 * word], w.codes[b][2 * word + 1]};
      to = Dequant<Act, kBits>::run(words);
    }
    if (kMode != ScaleMode::kNone) apply_packed_scales<Act>(to, w.scales[b]);
  }

  // This warp no longer reads the stage. Every block of the cluster writes into all of them, so all are told.
  __device__ __forceinline__ void release(int stage) const {
    const int l = threadIdx.x % format::kLanes;
    if constexpr (Base::kCluster > 1) {
      if (l < Base::kCluster) ptx::mbarrier_arrive_remote(this->empty(stage), l);
    } else {
      if (l == 0) ptx::mbarrier_arrive(this->empty(stage));
    }
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
    dequantize(buffers[0], w, this->weights_at(place.stage), 0);
    // Carried along, so that the compiler does not work it out again from the start of shared memory, a slow special register.
    uint32_t low = ptx::descriptor_low(this->acts_at(place.stage));
    int before = 0;
    for (int col = work.first_col; col < work.last_col; ++col) {
      const uint32_t stage = this->weights_at(place.stage);
      const Place next = place.next();
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int step = u / kPanels, b = u % kPanels;
        constexpr int kStepsPerHalf = format::kSliceSteps / kHalves;
        const uint32_t offset = step / kStepsPerHalf * (kTile.block_m * kSwizzleRowBytes) +
                                step % kStepsPerHalf * (kSwizzleRowBytes / kStepsPerHalf);
        const uint64_t acts = ptx::descriptor(low + offset / kDescriptorUnit);
        ptx::wgmma_fence();
        // here problem space becomes instruction space: weights are the sparse operand a, activations are b
        if (step % 2 == 0) {
          Wgmma::template run<0>(sums[b], buffers[u % kBuffers].reg, acts, w.meta[b][step / 2]);
        } else {
          Wgmma::template run<1>(sums[b], buffers[u % kBuffers].reg, acts, w.meta[b][step / 2]);
        }
        ptx::wgmma_commit();
        if (u + 1 < kUnits) dequantize(buffers[(u + 1) % kBuffers], w, stage, u + 1);
        ptx::wgmma_wait<kInFlight>();
        if (u == 1) {  // the last unit of the stage before is done
          if (col > work.first_col) release(before);
#pragma unroll
          for (int i = 0; i < kPanels; ++i) renew(w.meta[i][1], w.next_meta[i]);
        }
        if (u == kUnits - 1 && col + 1 < work.last_col) {
          ptx::mbarrier_wait(this->full(next.stage), next.parity);
          load_first(w, this->weights_at(next.stage));
          dequantize(buffers[0], w, this->weights_at(next.stage), 0);
        }
      }
      before = place.stage;
      constexpr int kStageStep = kSmem.acts_bytes / kDescriptorUnit;
      low += next.stage == 0 ? -(kSmem.stages - 1) * kStageStep : kStageStep;
      place = next;
    }
    ptx::wgmma_wait<0>();
    release(before);
  }
};

}  // namespace sparse_marlin::device
