// Registers of an SM, the same on all that the kernels run on: each of its schedulers shares out its own among its warps.
#pragma once

namespace sparse_marlin {

inline constexpr int kSchedulers = 4;
inline constexpr int kSchedulerRegisters = 16384;
inline constexpr int kRegisterUnit = 8;  // a thread takes a multiple of it

}  // namespace sparse_marlin
