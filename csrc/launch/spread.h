// How a launch with no more blocks than SMs keeps them one on each (Plan::spread). Blocks of a dependent launch start where those of the
// kernel before have ended first: left alone, 128 of them lie two on each of 64 SMs, and the next 128 on the other 64.
//
// Two of the launch must not fit an SM; one of it and one of the next launch should, so that this one asks for its weights while the other
// still computes. No single limit allows both, so launches take turns: one asks for more than half of an SM's shared memory,
// the next for more than half of its registers, by warps that do nothing.
#pragma once
#include <algorithm>
#include <atomic>

#include "format/packed_24.h"
#include "plan/plan.h"
#include "plan/registers.h"
#include "plan/smem.h"

namespace sparse_marlin {

struct BlockSize {
  int threads;
  int smem_bytes;
};

// What the last such launch of the process did. Only time depends on it, so threads may race for it.
inline std::atomic<bool> last_spread_by_registers{false};

inline BlockSize spread_by_smem(const Plan& plan, const Device& device) {
  last_spread_by_registers.store(false, std::memory_order_relaxed);
  return {plan.threads, std::max(plan.smem_bytes, smem_alone(device.smem_per_sm))};
}

// The size of a launch's blocks, for kernels without spare warps.
inline BlockSize block_size(const Plan& plan, const Device& device) {
  return plan.spread ? spread_by_smem(plan, device) : BlockSize{plan.threads, plan.smem_bytes};
}

// Warps of more than half of an SM's registers.
constexpr int warps_alone(int registers, int* fit) {
  const int of_thread = (registers + kRegisterUnit - 1) / kRegisterUnit * kRegisterUnit;
  *fit = kSchedulerRegisters / (of_thread * format::kLanes) * kSchedulers;
  return *fit / 2 + 1;
}

// For kernels in which warps past plan.threads wait for the others' end; `registers` of a thread.
inline BlockSize block_size(const Plan& plan, const Device& device, int registers) {
  if (!plan.spread || !plan.dependent) return block_size(plan, device);
  int fit = 0;
  const int warps = plan.threads / format::kLanes, alone = std::max(warps, warps_alone(registers, &fit));
  if (alone + warps > fit || last_spread_by_registers.load(std::memory_order_relaxed))
    return spread_by_smem(plan, device);
  last_spread_by_registers.store(true, std::memory_order_relaxed);
  return {alone * format::kLanes, plan.smem_bytes};
}

}  // namespace sparse_marlin
