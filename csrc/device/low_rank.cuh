// out += (acts @ down^T) @ up^T: the low-rank correction of a layer for few tokens, one small kernel right behind the multiplication
// that wrote `out` (compute capability 9.0).
//
//   cluster    8 blocks have 16 tokens x 2048 features
//   project    a block reads an eighth of k of the activations and of all rows of `down`: its share of t = acts @ down^T
//   exchange   shares are added in the order of the blocks, each float4 of t by the block that owns it, and go back to all 8:
//              distributed shared memory and two cluster barriers, so there is no workspace, no flag and no atomic operation, and
//              nothing that two streams or two graphs could share
//   expand     a warp multiplies t by its rows of `up`; then waits for the multiplication, adds in float32, rounds once
//
// Every cluster projects for itself. That reads `down` once for every 2048 features (from L2, except for the first time), but a
// projection shared by all blocks would need a counter in device memory that is zero before every launch, of every graph too.
//
// Dependent launch. All before the wait at the end overlaps the multiplication. It reads acts, down and up before that wait, which is
// safe behind our own kernels only: they let this one start after their own wait, that is when everything before them is complete,
// and they read the same activations. Like them it lets its successor start after its own wait: never are three kernels in flight.
#pragma once
#include "device/epilogue.cuh"
#include "device/ptx/dependent_launch.cuh"
#include "device/ptx/hopper.cuh"
#include "device/ptx/load_global.cuh"
#include "device/ptx/mbarrier.cuh"
#include "device/ptx/mma.cuh"

namespace sparse_marlin::device {

struct LowRankArgs {
  const void* acts;  // [m, k]
  const void* down;  // [rank, k]
  const void* up;    // [n, rank]
  void* out;         // [m, n]
  int m;
  int n;
  int k;  // a multiple of 8, as rank is
  int rank;
};

inline constexpr int kLowRankCluster = 8;     // blocks
inline constexpr int kLowRankTokens = 16;     // of a cluster: the rows of an MMA
inline constexpr int kLowRankFeatures = 256;  // of a block
inline constexpr int kLowRankMultiple = 8;    // values that are loaded at once

// Many warps read faster, few find a place beside a multiplication that fills the SMs.
template <int kWarps>
struct LowRankShape {
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kWarpsR = 2, kWarpsK = kWarps / kWarpsR;  // projecting: warps along the rank and along k
  static constexpr int kWarpRanks = 32;
  static constexpr int kRanks = kWarpRanks * kWarpsR;  // projected at once
  static constexpr int kSumsPitch = kRanks + 8;        // rows 8 banks apart: the lanes of a store meet in no bank
  static constexpr int kPadOfT = 16;                   // rows of t 16 banks apart, where the rank is a multiple of 32

  // Floats of shared memory for `rows` tokens: the sums of the warps along k, later t in the same place, then the block's share.
  static constexpr int sums_floats(int rows, int rank) {
    const int sums = kWarpsK * kSumsPitch, t = rank + kPadOfT;
    return rows * (sums > t ? sums : t);
  }
  static constexpr int smem_bytes(int rows, int rank) {
    return static_cast<int>(sizeof(float)) * (sums_floats(rows, rank) + rows * rank);
  }
};

extern __shared__ float4 low_rank_shared[];

// One warp's part. g and c as in ptx/mma.cuh. Along the depth of a product any order will do as long as both operands have it, so a
// lane loads 8 neighbours with one instruction: c has 8c .. 8c + 7 of 32.
template <typename Act, int kWarps>
struct LowRank {
  using Shape = LowRankShape<kWarps>;
  static constexpr int kVector = 4;
  static constexpr int kStep = 32;                       // depth of one load by all lanes
  static constexpr int kTogether = kWarps >= 8 ? 2 : 1;  // steps loaded at once, as far as the registers go
  static constexpr int kUpStep = 16;                     // of ranks: 4 a lane
  static constexpr int kUpTogether = kWarps >= 8 ? 2 : 1;
  static constexpr int kRankTiles = Shape::kWarpRanks / 8;  // columns of MMAs
  static constexpr int kWarpFeatures = kLowRankFeatures / kWarps;
  static constexpr int kNeighbours = 8;
  static constexpr int kGroup = 4 * kNeighbours;  // features that 4 MMAs share out so that a lane gets 8 neighbours
  static constexpr int kGroupTiles = kGroup / 8;
  static constexpr int kGroups = kWarpFeatures / kGroup;

  const LowRankArgs& args;
  const int warp, g, c;

  // Worked out where they are needed: registers are few. In shared memory: the sums [warp along k][row][rank of the group]; t
  // [row][rank] in the same place; the block's share of t [row][rank]. Rows are the tokens of the cluster from token0 on.
  static __device__ __forceinline__ float* sums() { return reinterpret_cast<float*>(low_rank_shared); }
  static __device__ __forceinline__ float* t() { return sums(); }
  __device__ __forceinline__ float* share() const { return sums() + Shape::sums_floats(rows(), args.rank); }
  __device__ __forceinline__ int rows() const { return min(args.m, kLowRankTokens); }
  __device__ __forceinline__ int t_pitch() const { return args.rank + Shape::kPadOfT; }
  static __device__ __forceinline__ int token0() { return static_cast<int>(blockIdx.y) * kLowRankTokens; }
  static __device__ __forceinline__ int feature0() { return static_cast<int>(blockIdx.x) * kLowRankFeatures; }

  // 8 values, or zeros. Past L1, where nothing would be found again.
  static __device__ __forceinline__ uint4 load(const Act* from, bool exists) {
    return exists ? __ldcg(reinterpret_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
  }

  static __device__ __forceinline__ void prefetch(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
  }
  // What the warp reads of `down` after its first turn: a row for each lane, in each turn at most one cache line of it.
  __device__ __forceinline__ void prefetch_down(int rank0, int col0, int stride) const {
    const int rank = rank0 + 4 * g + c;
    if (rank >= args.rank) return;
    const Act* const row = static_cast<const Act*>(args.down) + static_cast<int64_t>(rank) * args.k;
#pragma unroll 1
    for (int col = col0 + stride; col < args.k; col += stride) prefetch(row + col);
  }

  // Sums of the warp's columns for ranks rank0 .. rank0 + 31.
  __device__ __forceinline__ void project(float (&sum)[kRankTiles][4], int rank0) const {
    constexpr int kCols = kStep * kTogether, kStride = kLowRankCluster * Shape::kWarpsK * kCols;
    const int col0 = (ptx::cluster_block() * Shape::kWarpsK + warp / Shape::kWarpsR) * kCols;
    const Act* acts = static_cast<const Act*>(args.acts) + static_cast<int64_t>(token0() + g) * args.k + col0 + 8 * c;
    const Act* down = static_cast<const Act*>(args.down) + static_cast<int64_t>(rank0 + g) * args.k + col0 + 8 * c;
    const bool low = token0() + g < args.m, high = token0() + g + 8 < args.m;
    prefetch_down(rank0, col0, kStride);
#pragma unroll 1
    for (int left = args.k - col0; left > 0; left -= kStride, acts += kStride, down += kStride) {
      uint4 a[kTogether][2], b[kTogether][kRankTiles];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const bool in_row = i * kStep + 8 * c < left;
        a[i][0] = load(acts + i * kStep, low && in_row);
        a[i][1] = load(acts + 8 * args.k + i * kStep, high && in_row);
#pragma unroll
        for (int j = 0; j < kRankTiles; ++j)
          b[i][j] = load(down + 8 * j * args.k + i * kStep, rank0 + 8 * j < args.rank && in_row);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const uint32_t near[4] = {a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y};
        const uint32_t far[4] = {a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w};
#pragma unroll
        for (int j = 0; j < kRankTiles; ++j) ptx::mma_16<Act>(sum[j], near, {b[i][j].x, b[i][j].y});
#pragma unroll
        for (int j = 0; j < kRankTiles; ++j) ptx::mma_16<Act>(sum[j], far, {b[i][j].z, b[i][j].w});
      }
    }
  }

  // The block's share of t: the sums of its warps, in their order.
  __device__ __forceinline__ void project_all() const {
    const int in_group = warp % Shape::kWarpsR * Shape::kWarpRanks;
    float* const to = sums() + (warp / Shape::kWarpsR * rows() + g) * Shape::kSumsPitch + in_group + 2 * c;
#pragma unroll 1
    for (int first = 0; first < args.rank; first += Shape::kRanks) {
      float sum[kRankTiles][4] = {};
      if (first + in_group < args.rank) project(sum, first + in_group);
      if (first > 0) __syncthreads();  // the sums before have been added
#pragma unroll
      for (int j = 0; j < kRankTiles; ++j) {
        if (g < rows()) *reinterpret_cast<float2*>(to + 8 * j) = {sum[j][0], sum[j][1]};
        if (g + 8 < rows()) *reinterpret_cast<float2*>(to + 8 * j + 8 * Shape::kSumsPitch) = {sum[j][2], sum[j][3]};
      }
      __syncthreads();
      constexpr int kRowVectors = Shape::kRanks / kVector;
#pragma unroll 1
      for (int i = threadIdx.x; i < rows() * kRowVectors; i += Shape::kThreads) {
        const int row = i / kRowVectors, rank = i % kRowVectors * kVector;
        if (first + rank >= args.rank) continue;
        const float* from = sums() + row * Shape::kSumsPitch + rank;
        float4 total = *reinterpret_cast<const float4*>(from);
#pragma unroll
        for (int k = 1; k < Shape::kWarpsK; ++k)
          total = add(total, *reinterpret_cast<const float4*>(from + k * rows() * Shape::kSumsPitch));
        *reinterpret_cast<float4*>(share() + row * args.rank + first + rank) = total;
      }
    }
  }

  static __device__ __forceinline__ float4 add(const float4& a, const float4& b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
  }

  // The shares of the blocks -> t, in all of them.
  __device__ __forceinline__ void exchange() const {
    __syncwarp();
    ptx::cluster_sync();  // the shares are there, and nobody needs the sums any more
    const int row_vectors = args.rank / kVector, vectors = rows() * row_vectors;
    const uint32_t from = ptx::smem_address(share()), to = ptx::smem_address(t());
    constexpr int kVectorBytes = kVector * static_cast<int>(sizeof(float));
#pragma unroll 1
    for (int i = ptx::cluster_block() + kLowRankCluster * static_cast<int>(threadIdx.x); i < vectors;
         i += kLowRankCluster * Shape::kThreads) {  // 2 turns at most
      float4 part[kLowRankCluster];
#pragma unroll
      for (int b = 0; b < kLowRankCluster; ++b) part[b] = ptx::load_remote(from + i * kVectorBytes, b);
#pragma unroll
      for (int b = 1; b < kLowRankCluster; ++b) part[0] = add(part[0], part[b]);
      const int row = i / row_vectors, rank = i % row_vectors * kVector;
      const uint32_t at = to + (row * t_pitch() + rank) * static_cast<int>(sizeof(float));
#pragma unroll
      for (int b = 0; b < kLowRankCluster; ++b) ptx::store_remote(ptx::remote_address(at, b), part[0]);
    }
    __syncwarp();
    ptx::cluster_sync();  // t is complete, and nobody reads another block's memory any more: each may end when it likes
  }

  // Column g of MMA j of a group stands for the feature first_row + 2j: a lane's sums, columns 2c and 2c + 1 of the 4 MMAs, are then
  // those of 8 neighbours from first_feature on.
  __device__ __forceinline__ int first_row(int group) const {
    return feature0() + warp * kWarpFeatures + group * kGroup + 8 * (g / 2) + g % 2;
  }
  __device__ __forceinline__ int first_feature(int group) const {
    return feature0() + warp * kWarpFeatures + group * kGroup + 8 * c;
  }

  // Before anything else: asks L2 for the block's rows of `up`.
  __device__ __forceinline__ void prefetch_up() const {
    constexpr int kLine = 128;
    const char* const first =
        reinterpret_cast<const char*>(static_cast<const Act*>(args.up) + static_cast<int64_t>(feature0()) * args.rank);
    const int bytes = min(kLowRankFeatures, args.n - feature0()) * args.rank * static_cast<int>(sizeof(Act));
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) * kLine; i < bytes; i += Shape::kThreads * kLine) prefetch(first + i);
  }

  // The group's features. t is multiplied in two parts of TF32 with 11 significant bits each; `up` is exact in TF32 whichever of the
  // two types it has.
  __device__ __forceinline__ void expand(float (&sum)[kGroupTiles][4], int group) const {
    const Act* up = static_cast<const Act*>(args.up) + static_cast<int64_t>(first_row(group)) * args.rank + kVector * c;
    const int rows_left = args.n - first_row(group);
    const float* from = t() + g * t_pitch() + kVector * c;
#pragma unroll 1
    for (int left = args.rank; left > 0; left -= kUpTogether * kUpStep) {
      uint2 b[kUpTogether][kGroupTiles];
#pragma unroll
      for (int i = 0; i < kUpTogether; ++i) {
#pragma unroll
        for (int j = 0; j < kGroupTiles; ++j) {
          const bool exists = i * kUpStep + kVector * c < left && 2 * j < rows_left;
          b[i][j] = exists ? __ldcg(reinterpret_cast<const uint2*>(up + 2 * j * args.rank + i * kUpStep)) : uint2{0, 0};
        }
      }
#pragma unroll
      for (int i = 0; i < kUpTogether; ++i) {
        const bool in_rank = i * kUpStep + kVector * c < left;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // zeros past the rank: what meets the zeros of b must be finite
          float2 low = {0, 0}, high = {0, 0};
          if (in_rank && g < rows()) low = *reinterpret_cast<const float2*>(from + i * kUpStep + 2 * half);
          if (in_rank && g + 8 < rows())
            high = *reinterpret_cast<const float2*>(from + 8 * t_pitch() + i * kUpStep + 2 * half);
          uint32_t pairs[kGroupTiles];
#pragma unroll
          for (int j = 0; j < kGroupTiles; ++j) pairs[j] = half == 0 ? b[i][j].x : b[i][j].y;
          multiply(sum, {low.x, high.x, low.y, high.y}, pairs);
        }
      }
      up += kUpTogether * kUpStep;
      from += kUpTogether * kUpStep;
    }
  }
  // One step of 8 ranks; of each lane two neighbours.
  static __device__ __forceinline__ void multiply(float (&sum)[kGroupTiles][4], const float (&a)[4],
                                                  const uint32_t (&b)[kGroupTiles]) {
    uint32_t rounded[4], rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rounded[i] = ptx::to_tf32(a[i]);
      const float whole = __uint_as_float(rounded[i]);
      rest[i] = whole == a[i] ? 0 : ptx::to_tf32(a[i] - whole);  // not infinity minus infinity
    }
#pragma unroll
    for (int j = 0; j < kGroupTiles; ++j) {
      const uint32_t pair[2] = {__float_as_uint(value(b[j])), __float_as_uint(value(b[j] >> 16))};
      ptx::mma_tf32(sum[j], rest, pair);
      ptx::mma_tf32(sum[j], rounded, pair);
    }
  }
  static __device__ __forceinline__ float value(uint32_t bits) {  // the lower half
    const uint16_t half = static_cast<uint16_t>(bits);
    Act v;
    memcpy(&v, &half, sizeof(v));
    return to_float(v);
  }

  // out += sum, rounded once; 8 neighbours of rows g and g + 8 in each group.
  using Sums = float[kGroups][kGroupTiles][4];
  __device__ __forceinline__ bool exists(int half, int group) const {
    return token0() + g + 8 * half < args.m && first_feature(group) < args.n;
  }
  __device__ __forceinline__ void add_to_out(const Sums& sums) const {
    Act* const out = static_cast<Act*>(args.out) + static_cast<int64_t>(token0() + g) * args.n + first_feature(0);
    if (args.n % kNeighbours == 0)
      add_aligned(sums, out);
    else
      add_ragged(sums, out);
  }
  __device__ __forceinline__ void add_aligned(const Sums& sums, Act* out) const {
    uint4 old[2][kGroups];  // all loads before the first store, so that they are in flight together
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int q = 0; q < kGroups; ++q)
        if (exists(half, q)) old[half][q] = ptx::load_global_v4(out + 8 * half * args.n + q * kGroup);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int q = 0; q < kGroups; ++q) {
        if (!exists(half, q)) continue;
        Act values[kNeighbours];
        memcpy(values, &old[half][q], sizeof(values));
#pragma unroll
        for (int i = 0; i < kNeighbours; ++i)
          values[i] = from_float<Act>(to_float(values[i]) + sums[q][i / 2][2 * half + i % 2]);
        memcpy(&old[half][q], values, sizeof(values));
        *reinterpret_cast<uint4*>(out + 8 * half * args.n + q * kGroup) = old[half][q];
      }
    }
  }
  __device__ __forceinline__ void add_ragged(const Sums& sums, Act* out) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int q = 0; q < kGroups; ++q) {
        unsigned short* const at = reinterpret_cast<unsigned short*>(out + 8 * half * args.n + q * kGroup);
        const int count = exists(half, q) ? min(args.n - first_feature(q), kNeighbours) : 0;
        unsigned short old[kNeighbours];
#pragma unroll
        for (int i = 0; i < kNeighbours; ++i) old[i] = i < count ? ptx::load_global_16(at + i) : 0;
#pragma unroll
        for (int i = 0; i < kNeighbours; ++i) {
          const Act v = from_float<Act>(value(old[i]) + sums[q][i / 2][2 * half + i % 2]);
          memcpy(&old[i], &v, sizeof(v));
          if (i < count) at[i] = old[i];
        }
      }
    }
  }
};

// Grid: features / 256, in whole clusters, x tokens / 16.
template <typename Act, int kWarps>
__global__ void __launch_bounds__(LowRankShape<kWarps>::kThreads, kWarps >= 8 ? 2 : 7)
    low_rank(const __grid_constant__ LowRankArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using Part = LowRank<Act, kWarps>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const Part part{args, warp, lane / 4, lane % 4};
  part.prefetch_up();
  part.project_all();
  part.exchange();
  typename Part::Sums sum = {};
#pragma unroll
  for (int group = 0; group < Part::kGroups; ++group) part.expand(sum[group], group);
  ptx::grid_dependency_wait();  // the multiplication has written `out`
  ptx::grid_launch_dependents();
  part.add_to_out(sum);
#endif
}

}  // namespace sparse_marlin::device
