// The Hopper main loop: 4-bit or 8-bit weights as the sparse operand of wgmma.sp. Consumer warpgroups turn codes into scaled 16-bit
// weights in registers, ahead of use, and multiply them with activations in shared memory. docs/KERNEL_SM90.md has the drawing and
// the cycle budget.
//
// A unit is one wgmma: one panel (64 features) and one step (32 columns). Up to three are in flight while the next is dequantized,
// so there are four buffers of weights. Larger groups of units would have less overhead, but measure slower.
//
// Three rules the compiler does not keep for us (tests/test_sass.py checks them on the machine code):
//   - the metadata register of an unfinished wgmma may be overwritten by ptxas, which tracks operands a and d only: renew().
//   - where two ways with different sums meet, ptxas copies them before the wait that ends the wgmmas: no way around the loop.
//   - descriptors must live in uniform registers: loop state is kept warp-uniform and free of indexed constants.
#pragma once
#include "device/dequant.cuh"
#include "device/pipeline_sm90.cuh"
#include "device/ptx/cp_async.cuh"
#include "device/ptx/wgmma_sp.cuh"

namespace sparse_marlin::device {

inline constexpr int kDescriptorUnit = 16;  // bytes that addresses in descriptors count

// A warpgroup that computes kTile.panels panels.
template <typename Act, int kBits, ShapeSm90 kTile, ScaleMode kMode>
struct ConsumerSm90 : PipelineSm90<Act, kBits, kTile, kMode> {
  using Base = PipelineSm90<Act, kBits, kTile, kMode>;
  using Base::args;
  using Base::kSmem;
  using typename Base::Place;
  static constexpr int kPanels = kTile.panels, kTeams = kTile.teams;
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
  const int warpgroup;  // of its team

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

  // Of the warpgroup's panels.
  __device__ __forceinline__ int first_feature(const BlockWork& work) const {
    return this->feature0(work) + warpgroup * kPanels * format::kTileRows;
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

  // sums = the product over the columns of `work` that are the team's; `place` moves on by as many stages, where there is one team. Teams
  // have code of their own: with one for all, the place in the ring would live in ordinary registers.
  template <int kTeam>
  __device__ __forceinline__ void run(Sums& sums, Weights& w, const BlockWork& work, Place& place) const {
    ptx::FragA buffers[kBuffers];
#pragma unroll
    for (int b = 0; b < kPanels; ++b)
#pragma unroll
      for (int i = 0; i < kTile.block_m / 2; ++i) sums[b][i] = 0;
    const int cols =
        (work.last_col - work.first_col + kTeams - 1 - kTeam) / kTeams;  // at least one: the planner sees to it
    if (kTeam > 0) place = place.template next<kTeam>();
    ptx::mbarrier_wait(this->full(place.stage), place.parity);
    load_first(w, this->weights_at(place.stage));
    renew(w, 0);
    dequantize(buffers[0], w, this->weights_at(place.stage), 0);
    // Carried along, so that the compiler does not work it out again from the start of shared memory, a slow special register.
    constexpr int kStageStep = kSmem.acts_bytes / kDescriptorUnit;
    uint32_t acts = ptx::descriptor_low(this->acts_at(place.stage));
    const uint32_t end = acts + (kSmem.stages - place.stage) * kStageStep;
    const auto turn = [&](int i) {
      const Place next = place.template next<kTeams>();
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
          if (i > 0) release(place.template before<kTeams>());
          renew(w, 1);
        }
        if (u == kUnits - 1 && !last) renew(w, 0);
      }
      acts += kTeams * kStageStep;
      if (kTeams > 1 ? next.stage < kTeams : acts == end) acts -= kSmem.stages * kStageStep;
      place = next;
    };
    if constexpr (kTeams == 1) {
      for (int i = 0; i < cols; ++i) turn(i);
    } else {  // a loop that might be left out joins two ways, where ptxas copies the sums before the wait that follows
      int i = 0;
      do {
        turn(i);
      } while (++i < cols);
    }
    ptx::wgmma_wait<0>();
    release(place.template before<kTeams>());
  }
};

}  // namespace sparse_marlin::device
