// What the Hopper kernel receives: the arguments every GEMM kernel gets, and maps for the tensor copies.
#pragma once
#include <cuda.h>

#include "device/kernel_args.h"
#include "plan/stream_k.h"

namespace sparse_marlin::device {

struct KernelArgsSm90 {
  KernelArgs gemm;          // a tile of tiles_n is share x block_n features
  CUtensorMap acts_map;     // [m, k], box: block_m tokens x 64 columns
  CUtensorMap last_map;     // the same for the last tile of tokens: a box of the last_tokens that exist
  CUtensorMap weights_map;  // [row tiles, 1024-byte rows, 256 words], box: what a block reads of a 128-column tile
  CUtensorMap scales_map;   // [groups, n], box: groups of a 128-column tile x block_n features; unset where channelwise
  CUtensorMap out_map;      // [m, n], box: store_tokens x 64 features; unset unless out_mapped
  int out_mapped;           // rows of the output start at multiples of 16 bytes, as tensor copies need
  StreamK stream;           // which output tiles are done whole, and the blocks' ranges of the others
  uint64_t* flags;          // of ranges whose sums are in gemm.partials: [range][consumer], then equal to the token
  uint64_t token;           // of this launch
  int share;                // blocks of a cluster along features; gemm.splits of them along k
  int last_tokens;          // rows past the end, which arrive as zeros, would take a copy longer than rows that exist
  int store_tokens;         // of one store: a pass of the epilogue, or a chunk where k is split
  uint32_t scales_bytes;    // of a stage
  uint32_t zero;            // 0, which the compiler must not know (renew in mainloop_sm90.cuh)
};

}  // namespace sparse_marlin::device
