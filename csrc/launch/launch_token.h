// 64 random bits, others for every launch: what blocks of a grid write to say that data is there (device/ptx/flag.cuh, device/ptx/packet.cuh).
#pragma once
#include <cstdint>
#include <random>

namespace sparse_marlin {

inline uint64_t launch_token() {
  thread_local std::mt19937_64 engine = [] {
    std::random_device entropy;
    std::seed_seq seed{entropy(), entropy(), entropy(), entropy()};
    return std::mt19937_64(seed);
  }();
  uint64_t token = 0;
  while (token == 0) token = engine();  // 0 is a cleared flag
  return token;
}

}  // namespace sparse_marlin
