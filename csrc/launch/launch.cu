// Starts the kernel of a plan and, where k is split across blocks, the kernel that adds the splits; before them, where rows do not
// start at multiples of 16 bytes, copies that do.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "device/align.cuh"
#include "device/reduce.cuh"
#include "launch/dependent_launch.cuh"
#include "launch/kernel_table.h"
#include "launch/launch.h"
#include "launch/launch_decode.h"
#include "launch/launch_sm90.h"
#include "launch/prepare_kernel.h"
#include "launch/spread.h"
#include "plan/smem.h"
#include "plan/tiles_all.h"
#include "plan/workspace.h"

namespace sparse_marlin {
namespace {

constexpr int kMaxDevices = 64;

int device_attribute(cudaDeviceAttr attribute, int index) {
  int value = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&value, attribute, index);
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA device: ") + cudaGetErrorString(status));
  return value;
}

Device read_device(int index) {
  Device d;
  d.compute_capability = 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, index) +
                         device_attribute(cudaDevAttrComputeCapabilityMinor, index);
  d.num_sms = device_attribute(cudaDevAttrMultiProcessorCount, index);
  d.smem_per_block = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  d.smem_per_sm = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  d.l2_bytes = device_attribute(cudaDevAttrL2CacheSize, index);
  // kHz and bits; two transfers a clock
  d.dram_gb_per_s = 2e-6 * device_attribute(cudaDevAttrMemoryClockRate, index) *
                    device_attribute(cudaDevAttrGlobalMemoryBusWidth, index) / 8;
#if !defined(SPARSE_MARLIN_SM90A)
  d.hopper_kernels = false;
#endif
  return d;
}

struct KernelChoice {
  GemmKernel kernel;
  int index;  // among all compiled kernels
};

KernelChoice find_kernel(const Problem& problem, int tile) {
  static const KernelTable* const tables[] = {&kKernelsF16Int4, &kKernelsF16Int8, &kKernelsBf16Int4, &kKernelsBf16Int8};
  const int table = (problem.dtype == DType::kFloat16 ? 0 : 2) + (problem.num_bits == 4 ? 0 : 1);
  const int mode = static_cast<int>(scale_mode(problem.group_size));
  return {(*tables[table])[mode][tile], (table * kScaleModes + mode) * static_cast<int>(kTiles.size()) + tile};
}
constexpr int kKernels = 4 * kScaleModes * static_cast<int>(kTiles.size());

// Splits whose sums a second kernel adds.
int reduced_splits(int tile, int splits) { return family(tile) == Family::kSm80 ? splits : 1; }

device::KernelArgs kernel_args(const Problem& problem, const Plan& plan, const GemmParams& params) {
  device::KernelArgs args{};
  args.params = params;
  args.m = static_cast<int>(problem.m);
  args.n = static_cast<int>(problem.n);
  args.k = static_cast<int>(problem.k);
  args.tiles_m = (args.m + block_m(plan.tile) - 1) / block_m(plan.tile);
  args.tiles_n = (args.n + tile_n(plan.tile) - 1) / tile_n(plan.tile);
  args.splits = std::max(1, plan.splits);
  args.num_groups = static_cast<int>(num_groups(problem.k, problem.group_size));
  args.group_size = problem.group_size;
  args.num_stages = plan.num_stages;
  if (family(plan.tile) == Family::kSm80) args.act_rows = act_rows(kTiles[plan.tile], problem.m);
  args.acts_row = args.k;
  args.scales_row = args.n;
  while (1 << args.group_shift < problem.group_size) ++args.group_shift;
  const int64_t partials = partial_bytes(problem, plan.tile, plan.splits, plan.grid);
  const Workspace places = workspace(problem, partials);
  char* base = static_cast<char*>(params.workspace);
  if (partials > 0) args.partials = reinterpret_cast<float*>(base);
  if (acts_need_copy(problem)) {
    args.params.acts = base + places.acts;
    args.acts_row = static_cast<int>(aligned_row(problem.k));
  }
  if (scales_need_copy(problem)) {
    args.params.scales = base + places.scales;
    args.scales_row = static_cast<int>(aligned_row(problem.n));
  }
  return args;
}

cudaError_t copy_aligned(const void* from, const void* to, int64_t rows, int64_t cols, const Device& device,
                         cudaStream_t stream) {
  const int64_t blocks = (rows * aligned_row(cols) + device::kAlignThreads - 1) / device::kAlignThreads;
  constexpr int kBlocksPerSm = 8;
  const int grid = static_cast<int>(std::min<int64_t>(blocks, static_cast<int64_t>(device.num_sms) * kBlocksPerSm));
  device::align_rows<<<grid, device::kAlignThreads, 0, stream>>>(
      static_cast<const uint16_t*>(from), static_cast<uint16_t*>(const_cast<void*>(to)), rows, static_cast<int>(cols),
      static_cast<int>(aligned_row(cols)));
  return cudaGetLastError();
}

cudaError_t launch_sm80(const Problem& problem, const Plan& plan, const device::KernelArgs& args, int device,
                        cudaStream_t stream) {
  const KernelChoice choice = find_kernel(problem, plan.tile);
  static std::array<std::atomic<int>, kMaxDevices * kKernels> registers{};
  const cudaError_t status =
      prepare_kernel(reinterpret_cast<const void*>(choice.kernel), device, registers[device * kKernels + choice.index]);
  if (status != cudaSuccess) return status;
  const BlockSize block = block_size(plan, device_properties(device));
  return launch_dependent(choice.kernel, args, plan.grid, block.threads, block.smem_bytes, 1,
                          plan.dependent && device_properties(device).compute_capability >= kDependent, stream);
}

cudaError_t launch_reduce(const Problem& problem, const Plan& plan, const device::KernelArgs& args,
                          const Device& device, cudaStream_t stream) {
  const int64_t vectors = problem.m * ((problem.n + device::kVector - 1) / device::kVector);
  const int64_t blocks = (vectors + device::kReduceThreads - 1) / device::kReduceThreads;
  constexpr int kBlocksPerSm = 8;  // 2048 threads
  const int grid = static_cast<int>(std::min<int64_t>(blocks, static_cast<int64_t>(device.num_sms) * kBlocksPerSm));
  const GemmKernel kernel =
      problem.dtype == DType::kFloat16 ? device::reduce_splits<__half> : device::reduce_splits<__nv_bfloat16>;
  return launch_dependent(kernel, args, grid, device::kReduceThreads, 0, 1,
                          plan.dependent && device.compute_capability >= kDependent, stream);
}

}  // namespace

const Device& device_properties(int index) {
  static std::array<Device, kMaxDevices> devices;
  static std::array<std::once_flag, kMaxDevices> once;
  if (index < 0 || index >= kMaxDevices) throw std::runtime_error("CUDA device: index " + std::to_string(index));
  std::call_once(once[index], [index] { devices[index] = read_device(index); });
  return devices[index];
}

std::string launch(const Problem& problem, const Plan& plan, const GemmParams& params, void* cuda_stream,
                   const LowRankFactors& factors, const NextWeights& next) {
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  const device::KernelArgs args = kernel_args(problem, plan, params);
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess && acts_need_copy(problem)) {
    status = copy_aligned(params.acts, args.params.acts, problem.m, problem.k, device_properties(device), stream);
  }
  if (status == cudaSuccess && scales_need_copy(problem)) {
    const int64_t groups = num_groups(problem.k, problem.group_size);
    status = copy_aligned(params.scales, args.params.scales, groups, problem.n, device_properties(device), stream);
  }
  if (status == cudaSuccess) {
    switch (family(plan.tile)) {
      case Family::kSm80: status = launch_sm80(problem, plan, args, device, stream); break;
      case Family::kSm90: status = launch_sm90(problem, plan, args, factors, device, stream); break;
      case Family::kDecode: status = launch_decode(problem, plan, args, factors, next, device, stream); break;
    }
  }
  if (status == cudaSuccess && reduced_splits(plan.tile, plan.splits) > 1)
    status = launch_reduce(problem, plan, args, device_properties(device), stream);
  if (status == cudaSuccess) return {};
  return std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
}

}  // namespace sparse_marlin
