// launch(Plan, GemmParams, stream): the only way a GEMM kernel is started. Includes no CUDA header, so that callers need none.
#pragma once
#include "device/params.h"
#include "plan/plan.h"

namespace sparse_marlin {

// Factors of a low-rank correction: row-major, contiguous, aligned to 16 bytes, dtype of the problem.
struct LowRankFactors {
  const void* down = nullptr;  // [Plan::rank, k]
  const void* up = nullptr;    // [n, Plan::rank]
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

// Properties of CUDA device `index`, read once and remembered. Throws std::runtime_error where there is none.
const Device& device_properties(int index);

}  // namespace sparse_marlin
