// launch(Plan, GemmParams, stream): the only way a GEMM kernel is started. Includes no CUDA header, so that callers need none.
#pragma once
#include "device/params.h"
#include "plan/plan.h"

namespace sparse_marlin {

// Enqueues the kernels of `plan` on `stream` (a cudaStream_t) of the current device. Returns an empty string or what went wrong.
std::string launch(const Problem& problem, const Plan& plan, const GemmParams& params, void* stream);

// Properties of CUDA device `index`, read once and remembered. Throws std::runtime_error where there is none.
const Device& device_properties(int index);

}  // namespace sparse_marlin
