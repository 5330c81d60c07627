// Starts the kernel that computes the first product of a low-rank correction.
#include <array>
#include <atomic>
#include <utility>

#include "device/kernel_project.cuh"
#include "launch/dependent_launch.cuh"
#include "launch/launch.h"
#include "launch/prepare_kernel.h"
#include "launch/tensor_map.h"
#include "plan/low_rank.h"
#include "plan/workspace.h"

namespace sparse_marlin {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kShapes = static_cast<int>(kProjectShapes.size());
using Kernel = void (*)(device::ProjectArgs);

template <typename Act, size_t... kShape>
constexpr std::array<Kernel, sizeof...(kShape)> kernels(std::index_sequence<kShape...>) {
  return {device::project<Act, static_cast<int>(kShape)>...};
}
template <size_t... kShape>
constexpr std::array<int, sizeof...(kShape)> shared_bytes(std::index_sequence<kShape...>) {
  constexpr auto bytes = [](bool has_ring, size_t size) {
    return static_cast<int>(size) + (has_ring ? kSwizzleAlign : 0);  // room to align the ring
  };
  return {bytes(kProjectShapes[kShape].has_ring(),
                sizeof(typename device::ProjectOf<__half, static_cast<int>(kShape)>::Shared))...};
}
constexpr auto kAll = std::make_index_sequence<kProjectShapes.size()>{};
constexpr std::array kKernels{kernels<__half>(kAll), kernels<__nv_bfloat16>(kAll)};
constexpr std::array kSharedBytes = shared_bytes(kAll);

}  // namespace

bool can_project(const Problem& problem, int64_t rank, const Device& device) {
  return device.compute_capability == kDependent && device.hopper_kernels && problem.k % kRowElements == 0 &&
         rank % kRowElements == 0 && problem.m * problem.k <= kMostProjected && rank <= kMaxRankPacked;
}

std::string launch_project(const Problem& problem, int rank, const void* acts, const void* down, void* out,
                           bool dependent, void* cuda_stream) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    const ProjectPlan plan = project_plan(problem.m, problem.k, rank, device_properties(device).num_sms);
    const ProjectShape& shape = kProjectShapes[plan.shape];
    device::ProjectArgs args{
        acts,        down, out, static_cast<int>(problem.m), static_cast<int>(problem.k), rank, plan.rank_tiles,
        plan.shares, {},   {}};
    const int type = problem.dtype == DType::kFloat16 ? 0 : 1;
    const auto rows = [&](const void* data, int64_t count, int box_rows) {
      return TensorMap<2>{type == 0 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                          data,
                          {size(problem.k), size(count)},
                          {size(problem.k * kActBytes)},
                          {extent(shape.unit_cols()), extent(box_rows)},
                          CU_TENSOR_MAP_SWIZZLE_128B};
    };
    if (shape.has_ring()) status = rows(acts, problem.m, shape.tokens()).write(&args.acts_map);
    if (shape.has_ring() && status == cudaSuccess) status = rows(down, rank, shape.ranks()).write(&args.down_map);
    const Kernel kernel = kKernels[type][plan.shape];
    static std::array<std::atomic<int>, kMaxDevices * 2 * kShapes> registers{};
    if (status == cudaSuccess) {
      status = prepare_kernel(reinterpret_cast<const void*>(kernel), device,
                              registers[(device * 2 + type) * kShapes + plan.shape]);
    }
    if (status == cudaSuccess) {
      status = launch_dependent(kernel, args, plan.grid, shape.threads(), kSharedBytes[plan.shape], plan.shares,
                                dependent, static_cast<cudaStream_t>(cuda_stream));
    }
  }
  if (status == cudaSuccess) return {};
  return std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
}

}  // namespace sparse_marlin
