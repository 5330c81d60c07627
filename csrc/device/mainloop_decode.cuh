// The main loop of the decode kernel: few tokens, so what counts is that the weights never stop coming.
//
// Every warp streams its own weights: it keeps a ring of stages full by bulk copies, over the ends of output tiles too, and refills a
// stage as soon as it has used it. Nobody else touches the ring, so a warp waits for nothing but its own bytes. Activations and
// scales are shared; one more warp brings them. The product is computed as in the portable kernel (mainloop_sm80.cuh), the scale of a
// group multiplying its float32 sums.
#pragma once
#include "device/dequant.cuh"
#include "device/loader_decode.cuh"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/cp_async.cuh"
#include "device/ptx/dependent_launch.cuh"
#include "device/ptx/hopper.cuh"
#include "device/ptx/mbarrier.cuh"
#include "device/ptx/mma_sp.cuh"

namespace sparse_marlin::device {

// A warp that computes.
template <typename Act, int kBits, TileDecode kTile, ScaleMode kMode, bool kLowRank>
struct DecodeWarp : DecodePlaces<kTile, kMode, kLowRank> {
  using Base = DecodePlaces<kTile, kMode, kLowRank>;
  using Base::args;
  using Base::kScaled;
  static constexpr int kSlices = kTile.slices;
  static constexpr int kBlocks = kTile.token_blocks();
  static constexpr int kSliceBytes = format::slice_bytes(kBits);
  static constexpr int kCols = kTile.turn_cols;
  static constexpr int kColBytes = kSlices * kSliceBytes;
  static constexpr int kStageBytes = kCols * kColBytes;
  // Column tiles multiplied side by side, as far as the sums of their groups fit the registers.
  static constexpr int kTogether = kCols * kSlices * kTile.token_blocks() <= 4 ? kCols : 1;
  static constexpr int kPlaneSteps = format::kSliceSteps * 4 / kBits;  // steps whose codes a lane gets with one load
  using Codes = Dequant<Act, kBits>;
  static constexpr int kPace = 2;  // stages on their way while the kernel before runs
  static constexpr uint32_t kPollNs = 100;
  struct Sums {
    ptx::FragD d[kSlices][kBlocks];
  };

  const int lane;
  const int warp_n;
  const int warp_k;
  const uint32_t ring;     // the warp's stages
  const uint32_t arrived;  // and their barriers

  // --- the stream of weights ---------------------------------------------------------------------------------------------
  struct Stream {
    uint32_t from;  // the warp's slices in the first column tile of the output tile's rows, in copies of 16 bytes
    int col;        // the warp's next column tile
    int left;       // turns
    int tile;       // output tile
  };

  __device__ __forceinline__ uint32_t weights_of(int tile) const {
    const uint32_t row = this->work(tile).tile_n * kTile.block_n() + warp_n * kSlices * format::kSliceRows;
    // rows past the last tile exist nowhere: read the last one again, the sums are never stored
    const int row_tile = min(static_cast<int>(row / format::kTileRows), args.start.last_row_tile);
    return row_tile * args.start.row_copies + row % format::kTileRows / format::kSliceRows * (kSliceBytes / kCopyBytes);
  }
  // One thread's.
  __device__ __forceinline__ void copy(const Stream& s, uint32_t stage, uint32_t barrier) const {
    ptx::mbarrier_arrive_expect(barrier, kStageBytes);
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      // column tiles past the end: the last one again, times zero activations
      const int col = min(s.col + j * args.start.col_step, args.start.cols - 1);
      const uint32_t copies = s.from + static_cast<uint32_t>(col) * (format::tile_bytes(kBits) / kCopyBytes);
      ptx::bulk_load(stage + j * kColBytes, args.start.weights + uint64_t{copies} * kCopyBytes, kColBytes, barrier,
                     args.start.policy);
    }
  }
  __device__ __forceinline__ void ask(Stream& s, uint32_t stage, uint32_t barrier) const {
    if (s.tile >= args.start.tiles) return;
    if (ptx::elect_one()) copy(s, stage, barrier);
    s.col += kCols * args.start.col_step;
    if (--s.left == 0) {
      s.col = this->first_col() + warp_k;
      s.left = args.start.turns;
      s.tile += this->step();
      if (s.tile < args.start.tiles) s.from = weights_of(s.tile);
    }
  }
  // When the last bytes are asked for: the memory is then busy until this kernel ends, and the next one's requests come behind. Earlier,
  // they would fill its ring at this one's cost, and the memory would rest at its end. That may be before this kernel's own wait.
  __device__ __forceinline__ void let_next_start(const Stream& s) const {
    bool last = s.tile >= args.start.tiles;
    if constexpr (kLowRank) last = last || (s.left <= args.low.early && s.tile + this->step() >= args.start.tiles);
    if (last && warp_k == 0 && warp_n == 0) ptx::grid_launch_dependents();
  }
  __device__ __forceinline__ RingPlace first_stage() const { return {ring, arrived}; }
  __device__ __forceinline__ void advance_stage(RingPlace& stage) const {
    stage.advance(kStageBytes, ring, arrived, args.start.stages);
  }
  // The ring's barriers, and its first bytes. Weights depend on no kernel before this one. The first stage is asked for before the other
  // barriers are made ready, which takes about as long as its bytes take to be asked for.
  __device__ __forceinline__ Stream start() const {
    if (ptx::elect_one()) {
      ptx::mbarrier_init(arrived, 1);
      ptx::mbarrier_init_fence();
    }
    __syncwarp();
    const int tile = this->first_tile();
    Stream s{0, this->first_col() + warp_k, args.start.turns, tile};
    if (tile < args.start.tiles) s.from = weights_of(tile);
    const RingPlace stage = first_stage();
    ask(s, stage.at, stage.barrier);
    init_barriers();
    fill<false>(s, 1, min(kPace, args.start.stages));
    return s;
  }
  // The rest of the ring; while the kernel before runs, kPace stages ahead of what has arrived: the memory is as busy with few requests as
  // with many, and what that kernel still writes and this one's first activations would wait behind them.
  __device__ __forceinline__ void go_on(Stream& s) const { fill<true>(s, kPace, args.start.stages); }
  template <bool kPaced>
  __device__ __forceinline__ void fill(Stream& s, int first, int last) const {
    RingPlace stage = first_stage();
    stage.at += first * kStageBytes;
    stage.barrier += first * kBarrierBytes;
#pragma unroll 1
    for (int i = first; i < last; ++i) {
      if (kPaced) {
        while (!ptx::mbarrier_test(this->started(), 0) &&
               !ptx::mbarrier_try_wait_for(stage.barrier - kPace * kBarrierBytes, 0, kPollNs)) {
        }
      }
      ask(s, stage.at, stage.barrier);
      stage.at += kStageBytes;
      stage.barrier += kBarrierBytes;
    }
  }
  // But for the first ones: the other stages' of this warp, and its share of the chunks'.
  __device__ __forceinline__ void init_barriers() const {
    if (ptx::elect_one()) {
#pragma unroll 1
      for (int i = 1; i < args.start.stages; ++i) ptx::mbarrier_init(arrived + i * kBarrierBytes, 1);
#pragma unroll 1
      for (int i = 1 + warp_k * kTile.warps_n + warp_n; i < args.smem.chunks; i += kTile.warps())
        this->init_chunk(this->first_chunk().barrier + i * kBarrierBytes);
      ptx::mbarrier_init_fence();
    }
    __syncwarp();
  }

  // --- column tiles ------------------------------------------------------------------------------------------------------
  struct Places {    // of this lane
    uint32_t codes;  // bytes from the start of a stage
    uint32_t meta;
    uint32_t tokens[kHalves][kBlocks];  // bytes from the start of a chunk
    uint32_t scales;
  };
  __device__ __forceinline__ Places places() const {
    Places p;
    p.codes = lane * uint32_t{sizeof(uint4)};
    p.meta = kMetaOffset + lane * uint32_t{sizeof(uint2)};
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (int q = 0; q < kBlocks; ++q) {
        // tokens that do not exist have no row: read the last one again, the product is never stored
        const int token = min(q * kMmaTokens + lane % kMmaTokens, args.smem.rows - 1);
        const int row = (warp_k * kHalves + h) * args.smem.rows + token;
        // 16-byte piece j of row r of a 128-byte swizzled box lies at j ^ (r % 8); a lane begins with piece lane / 8
        p.tokens[h][q] = row * kSwizzleRowBytes + ((lane / kMmaTokens) ^ (row % kMmaTokens)) * kCopyBytes;
      }
    }
    // row r of a slice's matrix, read transposed: the scales of its first 8 rows where r is even, of the others where it is odd
    const int slice = lane / kMmaTokens % kSlices;
    p.scales =
        args.smem.scales + ((warp_n * kSlices + slice) * format::kSliceRows + lane % 2 * format::kHalfRows) * kActBytes;
    p.scales += (warp_k * format::kTileCols >> args.gemm.group_shift) * kTile.block_n() * kActBytes;
    // keep them: the compiler would work them out again for every turn
    asm volatile("" : "+r"(p.codes), "+r"(p.meta), "+r"(p.scales), "+r"(p.tokens[0][0]), "+r"(p.tokens[1][0]));
    return p;
  }

  // Which of a column tile's groups a step belongs to.
  __device__ __forceinline__ int group_row(int step) const {
    return kMode == ScaleMode::kTiles ? 0 : step * format::kStepCols >> args.gemm.group_shift;
  }
  // sums += the sums of a group times its scales, loaded while the MMAs of the group run; for kCount slices. Returns bits that depend
  // on all loads.
  template <int kCount>
  __device__ __forceinline__ uint32_t add_scaled(Sums& sums, const Sums& group, uint32_t scales, int step,
                                                 int first) const {
    uint32_t loaded = 0, pairs[kCount];  // scales of rows g and g + 8
    ptx::ldmatrix_trans(pairs, scales + (group_row(step) * kTile.block_n() + first * format::kSliceRows) * kActBytes);
#pragma unroll
    for (int s = first; s < first + kCount; ++s) {
      const uint32_t pair = pairs[s - first];
      loaded |= pair;
      const float a = Pair<Act>::to_float(pair), b = Pair<Act>::high_to_float(pair);
#pragma unroll
      for (int q = 0; q < kBlocks; ++q) {
        float(&to)[4] = sums.d[s][q].reg;
        const float(&from_group)[4] = group.d[s][q].reg;
        to[0] += a * from_group[0];
        to[1] += a * from_group[1];
        to[2] += b * from_group[2];
        to[3] += b * from_group[3];
      }
    }
    return loaded;
  }
  static __device__ __forceinline__ ptx::FragA dequantize(const uint4& v, int step) {
    if constexpr (kBits == 4) {
      const uint32_t words[1] = {step == 0 ? v.x : step == 1 ? v.y : step == 2 ? v.z : v.w};
      return Codes::run(words);
    } else {
      const uint32_t words[2] = {step % 2 == 0 ? v.x : v.z, step % 2 == 0 ? v.y : v.w};
      return Codes::run(words);
    }
  }

  static constexpr int kMetaOffset = format::slice_code_words(kBits) * format::kWordBytes;  // in a slice
  // The same of the slice at `slice`, for a step that the compiler does not know.
  static __device__ __forceinline__ ptx::FragA codes_of_step(uint32_t slice, int lane, int step) {
    const uint32_t at = slice + lane * uint32_t{sizeof(uint4)};
    if constexpr (kBits == 4) {
      const uint32_t words[1] = {ptx::load_shared_32(at + step * format::kWordBytes)};
      return Codes::run(words);
    } else {
      const uint2 v = ptx::load_shared_v2(at + step / kPlaneSteps * (format::kLanes * uint32_t{sizeof(uint4)}) +
                                          step % kPlaneSteps * uint32_t{sizeof(uint2)});
      const uint32_t words[2] = {v.x, v.y};
      return Codes::run(words);
    }
  }

  struct Tile {            // of one column tile, in registers
    uint4 codes[kSlices];  // of the steps of one plane
    uint2 meta[kSlices];
  };
  __device__ __forceinline__ void load_codes(Tile& t, uint32_t from, const Places& places, int plane) const {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      t.codes[s] =
          ptx::load_shared_v4(from + places.codes + s * kSliceBytes + plane * format::kLanes * uint32_t{sizeof(uint4)});
    }
  }
  __device__ __forceinline__ void load_tile(Tile& t, uint32_t from, const Places& places) const {
    load_codes(t, from, places, 0);
#pragma unroll
    for (int s = 0; s < kSlices; ++s) t.meta[s] = ptx::load_shared_v2(from + places.meta + s * kSliceBytes);
  }

  // sums += kTogether column tiles, whose weights begin at `weights` and whose activations and scales are in `chunks`. Returns bits that
  // depend on the loads.
  __device__ __forceinline__ uint32_t multiply(Sums& sums, uint32_t weights, const uint32_t (&chunks)[kTogether],
                                               const Places& places) const {
    Tile tiles[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) load_tile(tiles[j], weights + j * kColBytes, places);
    Sums groups[kTogether] = {};  // where scales multiply them
    uint32_t loaded = 0;
#pragma unroll
    for (int step = 0; step < format::kSliceSteps; ++step) {
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        constexpr int kHalfSteps = format::kSliceSteps / kHalves;
        if (step > 0 && step % kPlaneSteps == 0)
          load_codes(tiles[j], weights + j * kColBytes, places, step / kPlaneSteps);
        const auto activations = [&](int q) {
          // an odd step begins with piece 4 of 8: the swizzle keeps that bit apart
          const uint32_t at =
              places.tokens[step / kHalfSteps][q] ^ (step % kHalfSteps * (kSwizzleRowBytes / kHalfSteps));
          const ptx::FragB x = ptx::ldmatrix_x4(chunks[j] + at);
          if (kMode == ScaleMode::kTiles && step == format::kSliceSteps - 1) loaded |= x.reg[0];
          return x;
        };
        const auto mma = [&](const ptx::FragA& w, const ptx::FragB& x, int s, int q) {
          // here problem space becomes instruction space: weights are the sparse operand a, activations are b
          ptx::FragD& d = kScaled ? groups[j].d[s][q] : sums.d[s][q];
          const uint32_t e = step < 2 ? tiles[j].meta[s].x : tiles[j].meta[s].y;
          if (kScaled && kMode == ScaleMode::kSteps) d = {};
          if (step % 2 == 0) {
            ptx::mma_sp<Act, 0>(d, w, x, e);
          } else {
            ptx::mma_sp<Act, 1>(d, w, x, e);
          }
        };
        const auto scale = [&](int s) {
          if (kScaled && kMode == ScaleMode::kSteps) add_scaled<1>(sums, groups[j], chunks[j] + places.scales, step, s);
        };
        // whichever has fewer registers is kept
        if constexpr (kBlocks > kSlices) {
          ptx::FragA w[kSlices];
#pragma unroll
          for (int s = 0; s < kSlices; ++s) {
            w[s] = dequantize(tiles[j].codes[s], step);
          }
#pragma unroll
          for (int q = 0; q < kBlocks; ++q) {
            const ptx::FragB x = activations(q);
#pragma unroll
            for (int s = 0; s < kSlices; ++s) mma(w[s], x, s, q);
          }
#pragma unroll
          for (int s = 0; s < kSlices; ++s) scale(s);
        } else {
          ptx::FragB x[kBlocks];
#pragma unroll
          for (int q = 0; q < kBlocks; ++q) x[q] = activations(q);
#pragma unroll
          for (int s = 0; s < kSlices; ++s) {
            ptx::FragA w = dequantize(tiles[j].codes[s], step);
#pragma unroll
            for (int q = 0; q < kBlocks; ++q) mma(w, x[q], s, q);
            scale(s);
          }
        }
      }
    }
    if (kScaled && kMode == ScaleMode::kTiles) {
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        loaded |= add_scaled<kSlices>(sums, groups[j], chunks[j] + places.scales, 0, 0);
      }
    } else {  // what has been loaded in any step has gone into the sums; bits of the loads would take registers until the end
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        loaded |= __float_as_uint(sums.d[s][0].reg[0]) | __float_as_uint(sums.d[s][0].reg[2]);
      }
#pragma unroll
      for (int q = 1; q < kBlocks; ++q) loaded |= __float_as_uint(sums.d[0][q].reg[0]);
    }
    return loaded;
  }

  // What a warp carries from tile to tile.
  struct State {
    Stream stream;
    RingPlace stage, chunk;
  };

  // sums = this warp's share of the product of an output tile.
  __device__ __forceinline__ void run(Sums& sums, State& state, const Places& places) const {
    sums = {};
    for (int turn = args.start.turns; turn > 0; --turn) {
      ptx::mbarrier_wait(state.stage.barrier, state.stage.parity);
#pragma unroll
      for (int j = 0; j < kCols; j += kTogether) {
        uint32_t chunks[kTogether], empty[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          chunks[i] = state.chunk.at;
          empty[i] = this->empty(state.chunk.barrier);
          ptx::mbarrier_wait(state.chunk.barrier, state.chunk.parity);
          this->advance(state.chunk);
        }
        // An arrival may overtake a load that was issued before it, and the bytes be overwritten under the load: it waits for the
        // load's value.
        const uint32_t after = multiply(sums, state.stage.at + j * kColBytes, chunks, places) & args.zero;
        __syncwarp();
        if (ptx::elect_one()) {
#pragma unroll
          for (int i = 0; i < kTogether; ++i) ptx::mbarrier_arrive(empty[i] + after);
        }
      }
      // All loads from the stage have returned, since the MMAs that were issued above needed them.
      ask(state.stream, state.stage.at, state.stage.barrier);
      let_next_start(state.stream);
      advance_stage(state.stage);
    }
  }
};

}  // namespace sparse_marlin::device
