#pragma once
#include "device/ptx/bulk_copy.cuh"

namespace sparse_marlin::ptx {

inline bool elect_one() {
  __syncwarp();  // all lanes come here
  return emulated::thread.x % emulated::kLanes == 0;
}
inline void named_barrier_arrive(int id, int threads) {
  emulated::arrive_at(emulated::barriers[emulated::rank][id], threads);
}
inline int cluster_block() { return emulated::rank; }
inline int cluster_id() { return emulated::block.x / emulated::cluster_blocks; }
inline void cluster_arrive() {
  emulated::arrive_at(emulated::cluster_barrier, emulated::cluster_blocks * emulated::block_threads);
}
inline void cluster_wait() {  // for what all have arrived at once
  while (emulated::cluster_barrier.turn == 0) emulated::yield();
}
inline void store_remote_counted(uint32_t address, uint32_t barrier, float4 v) {
  emulated::copy([=] {
    emulated::store(address, v);
    arrived(barrier, sizeof(v));
  });
}

}  // namespace sparse_marlin::ptx
