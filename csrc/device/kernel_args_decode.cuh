// What the decode kernel receives: the arguments every GEMM kernel gets, maps for the tensor copies, its shared memory.
#pragma once
#include <cuda.h>

#include "device/kernel_args.h"
#include "device/ptx/packet.cuh"
#include "plan/smem_decode.h"

namespace sparse_marlin::device {

// The low-rank correction (plan/low_rank.h).
struct LowRankArgs {
  const void* down;      // [rank, k] row-major, contiguous, as the activations
  ptx::Packet* packets;  // in the workspace (plan/low_rank.h)
  uint32_t* count;       // of blocks that have t
  uint64_t token;        // of this launch: the packets' tag
  int rank;
  int shares_log2;
  int num_packets;               // of t
  uint32_t rank_blocks_inverse;  // of the rank in eights; device/scheduler.cuh
  uint32_t packets_inverse;      // of rank / 4
  int project_blocks;            // blocks that project, in whole clusters,
  int first_project_block;       // of them,
  int first_cluster;             // and of those that multiply
  int step;                      // blocks that multiply
  int num_readers;               // blocks that take t
  int patience;         // where those that multiply come first: looks for t before one projects for itself; otherwise 0
  int early;            // turns before its last request at which a block lets the next launch start
  uint32_t down_piece;  // bytes of `down` that a block brings into L2
  // `up` in 128-column tiles of packed_24; tail == 0: dense, by its map alone
  int tail;
  int slice_bytes;
  const char* up;
  int64_t up_row_bytes;  // between two rows of row tiles
  int up_code_bytes;     // of a block
  uint32_t up_bytes;     // with its scales
};

// What a warp must know to ask for its first weights, in one line of the constant cache: at the start of a launch each line takes hundreds
// of clocks to come.
struct DecodeStart {
  const char* weights;
  uint64_t policy;      // of weights in L2
  uint32_t row_copies;  // between two rows of row tiles, in copies of 16 bytes
  int last_row_tile;
  int tiles_m;
  uint32_t tiles_m_inverse;  // device/scheduler.cuh
  int tiles;                 // output tiles
  int cols;                  // 128-column tiles of k
  int turns;                 // of a warp
  int col_step;              // column tiles that the warps along k of all splits take together
  int splits;
  int stages;        // of a warp's ring
  int ring;          // in shared memory: of the first warp
  int weights_full;  // its barriers
};
static_assert(sizeof(DecodeStart) <= 64);

// What to bring into L2 once this kernel has asked for all of its own: the weights that are read next, as far as they are worth it.
struct PrefetchArgs {
  const char* start;
  uint32_t bytes;  // 0: nothing
};

struct KernelArgsDecode {
  DecodeStart start;
  KernelArgs gemm;
  CUtensorMap acts_map;    // [k / 64][m][64], box: the tokens and columns of a chunk
  CUtensorMap scales_map;  // [groups, n], box: groups of a chunk x block_n features; unset where channelwise
  // Of a correction: [n, rank], box: block_n features x 64 ranks; where `up` is packed, its scales: [groups, n], box: all groups x block_n
  // features.
  CUtensorMap up_map;
  SmemDecode smem;
  uint32_t splits_inverse;  // device/scheduler.cuh
  uint32_t zero;            // 0, which the compiler must not know (run in mainloop_decode.cuh)
  LowRankArgs low;          // for the kernels with a correction
  PrefetchArgs next;
};

}  // namespace sparse_marlin::device
