// Starts the kernel of the low-rank correction.
#include "launch/low_rank.h"

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "device/low_rank.cuh"
#include "launch/dependent_launch.cuh"
#include "launch/launch.h"

namespace sparse_marlin {
namespace {

constexpr int kMostTokens = 64;  // more are for dense products: every 16 tokens read `down` again
constexpr int kMostRank = 256;   // 52 KB of shared memory
constexpr int kMaxDevices = 64;
constexpr int kClusters = 90;  // compute capability from which there are clusters and dependent launch
constexpr int kFewWarps = 4, kManyWarps = 8;

using Kernel = void (*)(device::LowRankArgs);
struct Choice {
  Kernel kernel;
  int threads;
  int smem_bytes;
  int features;  // of a block
};
template <int kWarps>
Choice choice(const LowRankParams& p, int rows) {
  const Kernel kernel =
      p.dtype == DType::kFloat16 ? device::low_rank<__half, kWarps> : device::low_rank<__nv_bfloat16, kWarps>;
  using Shape = device::LowRankShape<kWarps>;
  return {kernel, Shape::kThreads, Shape::smem_bytes(rows, static_cast<int>(p.rank)), Shape::kFeatures};
}

// Whether the code that a device runs is more than an empty shell: code for an older GPU, compiled again by the driver, has no
// clusters however new the GPU is.
bool has_code(int index) {
  enum : int { kUnknown, kYes, kNo };
  static std::array<std::atomic<int>, kMaxDevices> known{};
  int state = known[index].load(std::memory_order_relaxed);
  if (state == kUnknown) {
    cudaFuncAttributes attributes{};
    const cudaError_t status = cudaFuncGetAttributes(&attributes, device::low_rank<__half, kFewWarps>);
    if (status != cudaSuccess) static_cast<void>(cudaGetLastError());  // no code at all for this device
    state = status == cudaSuccess && attributes.ptxVersion >= kClusters ? kYes : kNo;
    known[index].store(state, std::memory_order_relaxed);
  }
  return state == kYes;
}

}  // namespace

bool takes_low_rank(const LowRankParams& p, int index) {
  return p.dtype != DType::kFloat32 && p.m >= 1 && p.m <= kMostTokens && p.rank >= 1 && p.rank <= kMostRank &&
         p.rank % device::kLowRankMultiple == 0 && p.k % device::kLowRankMultiple == 0 && index >= 0 &&
         index < kMaxDevices && has_code(index);
}

std::string add_low_rank(const LowRankParams& p, int index, bool dependent, void* stream) {
  device::LowRankArgs args{};
  args.acts = p.acts;
  args.down = p.down;
  args.up = p.up;
  args.out = p.out;
  args.m = static_cast<int>(p.m);
  args.n = static_cast<int>(p.n);
  args.k = static_cast<int>(p.k);
  args.rank = static_cast<int>(p.rank);
  const int tiles_m = (args.m + device::kLowRankTokens - 1) / device::kLowRankTokens;
  const int rows = args.m < device::kLowRankTokens ? args.m : device::kLowRankTokens;
  const auto grid_of = [&](const Choice& choice) {
    const int of_cluster = choice.features * device::kLowRankCluster;
    return (args.n + of_cluster - 1) / of_cluster * device::kLowRankCluster;
  };
  // Few blocks must be fast and find a place easily. Many follow a multiplication that fills the SMs, but takes longer, too: they
  // must be small enough to fit beside it, and not too many.
  Choice chosen = choice<kManyWarps>(p, rows);
  if (2 * grid_of(chosen) * tiles_m > device_properties(index).num_sms) chosen = choice<kFewWarps>(p, rows);
  constexpr int kAllowed = 48 * 1024;  // without asking
  if (chosen.smem_bytes > kAllowed) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(chosen.kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, chosen.smem_bytes);
    if (status != cudaSuccess) return std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
  }
  const cudaError_t status =
      launch_dependent(chosen.kernel, args, grid_of(chosen), chosen.threads, chosen.smem_bytes, device::kLowRankCluster,
                       dependent, static_cast<cudaStream_t>(stream), tiles_m);
  if (status == cudaSuccess) return {};
  return std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
}

}  // namespace sparse_marlin
