// launch(Plan, GemmParams, stream): the only way a GEMM kernel is started. Includes no CUDA header, so that callers need none.
#pragma once
#include "device/params.h"
#include "plan/plan.h"

namespace sparse_marlin {

// Factors of a low-rank correction: row-major, contiguous, aligned to 16 bytes, dtype of the problem; a packed `up` as weights are.
struct LowRankFactors {
  const void* down = nullptr;       // [Plan::rank, k]
  const void* up = nullptr;         // [n, Plan::rank]; packed (plan/low_rank.h): [row_tiles(n)] x up_row_words
  const void* up_scales = nullptr;  // of a packed `up`: [groups, n]
  int64_t up_row_words = 0;
  const void* projected = nullptr;  // [m, Plan::rank], acts * down^T, where the wgmma.sp kernel adds the correction
};

// packed_24 weights that the multiplication after this one reads: a hint, which kernels for few tokens take.
struct NextWeights {
  const void* start = nullptr;  // aligned to 16 bytes
  int64_t bytes = 0;            // from there on, a multiple of 16
};

// Enqueues the kernels of `plan` on `stream` (a cudaStream_t) of the current device. Returns an empty string or what went wrong.
// factors: read where Plan::rank > 0, like the weights before the kernel before has finished.
std::string launch(const Problem& problem, const Plan& plan, const GemmParams& params, void* stream,
                   const LowRankFactors& factors = {}, const NextWeights& next = {});

// out [m, rank] = acts * down^T, the first product of a low-rank correction, as a kernel that other kernels of ours may overlap. Where
// it can't or is slower, torch's product takes its place. All rows contiguous, aligned to 16 bytes. Returns as launch.
bool can_project(const Problem& problem, int64_t rank, const Device& device);
std::string launch_project(const Problem& problem, int rank, const void* acts, const void* down, void* out,
                           bool dependent, void* stream);

// Properties of CUDA device `index`, read once and remembered. Throws std::runtime_error where there is none.
const Device& device_properties(int index);

}  // namespace sparse_marlin
