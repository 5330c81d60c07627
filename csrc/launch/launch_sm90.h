// How launch() starts the Hopper kernel.
#pragma once
#include <cuda_runtime.h>

#include "device/kernel_args.h"
#include "launch/launch.h"
#include "plan/plan.h"

namespace sparse_marlin {

cudaError_t launch_sm90(const Problem& problem, const Plan& plan, const device::KernelArgs& args,
                        const LowRankFactors& factors, int device, cudaStream_t stream);

}  // namespace sparse_marlin
