// What the Hopper kernel receives: the arguments every GEMM kernel gets, and maps for the tensor copies.
#pragma once
#include <cuda.h>

#include "device/kernel_args.h"
#include "device/scheduler.cuh"
#include "plan/stream_k.h"

namespace sparse_marlin::device {

// What a thread must know to ask for its first bytes, in one line of the constant cache: at the start of a launch the first line takes
// 200 to 400 clocks to come, and each further one 60.
struct StartSm90 {
  TileOrder order;  // a tile of tiles_n is share x block_n features
  int tiles;        // output tiles
  int share;        // blocks of a cluster along features; order.splits of them along k
  StreamK stream;   // which output tiles are done whole, and the blocks' ranges of the others
};
static_assert(sizeof(StartSm90) <= 64);

struct KernelArgsSm90 {
  StartSm90 start;
  KernelArgs gemm;
  // [m, k], box: block_m tokens x 64 columns; where there are whole_tiles, [k / 64][m][64], box: block_m tokens x 128 columns
  CUtensorMap acts_map;
  // [m, k], of the last tile of tokens, where it is not whole, box: the last_tokens that exist x 64 columns
  CUtensorMap last_map;
  CUtensorMap weights_map;  // [row tiles, 1024-byte rows, 256 words], box: what a block reads of a 128-column tile
  CUtensorMap scales_map;   // [groups, n], box: groups of a 128-column tile x block_n features; unset where channelwise
  CUtensorMap out_map;      // [m, n], box: tokens of a pass x 64 features; unset where !copies_out
  // Of a low-rank correction with a packed second factor (plan/low_rank.h), whose column tiles come after the weight's; otherwise unset.
  CUtensorMap tail_acts_map;  // [m, rank], boxes as those of acts_map and last_map
  CUtensorMap tail_last_map;
  CUtensorMap tail_weights_map;  // [row tiles, 1024-byte rows, 256 words]
  CUtensorMap tail_scales_map;   // [groups, n]
  uint64_t weights_policy;       // in L2
  Divisor cols;                  // column tiles of k
  uint64_t* flags;        // of ranges whose sums are in gemm.partials: [range][consumer], then equal to the token
  uint64_t token;         // of this launch
  int whole_tiles;        // of tokens, the first ones: whose activations come by one copy a stage
  int own_cols;           // column tiles of the weight: those from here on are the correction's
  int last_tokens;        // rows past the end, which arrive as zeros, would take a copy longer than rows that exist
  uint32_t scales_bytes;  // of a stage
  int copies_out;         // the output leaves by tensor copies, otherwise the threads store it
  uint32_t zero;          // 0, which the compiler must not know (renew in mainloop_sm90.cuh)
};

}  // namespace sparse_marlin::device
