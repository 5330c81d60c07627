// The low-rank correction behind a multiplication: whether there is a kernel for it, and its start. Includes no CUDA header.
#pragma once
#include <string>

#include "format/problem.h"

namespace sparse_marlin {

// out[m, n] += (acts[m, k] * down[rank, k]^T) * up[n, rank]^T
struct LowRankParams {
  const void* acts;  // all row-major, contiguous, aligned to 16 bytes, of one type
  const void* down;
  const void* up;
  void* out;
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t rank;
  DType dtype;
};

// Whether the kernel takes the problem on CUDA device `index`: few tokens, a rank that is a multiple of 8, a GPU that this build has
// code with clusters for. What it does not take is for two dense products.
bool takes_low_rank(const LowRankParams& params, int index);

// Enqueues the kernel on `stream` (a cudaStream_t) of the current device, which must be `index`. What is before it on the stream must
// be the multiplication that writes `out` from the same `acts`, enqueued by launch() (device/low_rank.cuh says why). dependent: may
// start before that has finished. Returns an empty string or what went wrong.
std::string add_low_rank(const LowRankParams& params, int index, bool dependent, void* stream);

}  // namespace sparse_marlin
