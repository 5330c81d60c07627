// The CPU multiplication, straight from the packed bytes. No torch, no CUDA.
#pragma once
#include <cstdint>
#include <functional>

#include "device/params.h"
#include "format/problem.h"

namespace sparse_marlin {

// Runs body(begin, end) over sub-ranges of [0, count), each at least `grain` long unless it is the last; torch's thread
// pool in the operator, a plain loop in tests.
using ParallelFor =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body)>;

// Instruction sets the fast path can use; kBest asks the processor.
enum class CpuIsa : int { kBest = 0, kPortable = 1, kAvx2 = 2, kAvx512 = 3, kAvx512Bf16 = 4 };
bool cpu_isa_available(CpuIsa isa);
CpuIsa cpu_isa_best();
const char* cpu_isa_name(CpuIsa isa);

// out = acts * weight^T + bias, float32 accumulation in a fixed order (the result does not depend on the number of
// threads). Where the processor multiplies bfloat16, several tokens of it do so: subnormal activations then count as zero.
// params.workspace is not used.
void gemm_cpu(const Problem& problem, const GemmParams& params, const ParallelFor& parallel_for,
              CpuIsa isa = CpuIsa::kBest);

// The same by the plainest possible loops over the format's bijections, in float64: the reference for tests.
void gemm_reference(const Problem& problem, const GemmParams& params);

}  // namespace sparse_marlin
