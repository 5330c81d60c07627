#pragma once
#include "emulated/lanes.h"

namespace sparse_marlin::ptx {

inline void mbarrier_init(uint32_t barrier, int arrivals) {
  emulated::at(barrier, sizeof(uint64_t));
  emulated::mbarriers[emulated::in_block(barrier, emulated::rank)] = {arrivals, arrivals, 0, 0};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  emulated::MBarrier& b = emulated::mbarrier(barrier);
  b.bytes += bytes;
  --b.pending;
  emulated::advance(b);
}
inline void mbarrier_arrive(uint32_t barrier) { mbarrier_arrive_expect(barrier, 0); }
inline bool mbarrier_test(uint32_t barrier, uint32_t parity) { return emulated::mbarrier(barrier).phase % 2 != parity; }
inline bool mbarrier_try_wait_for(uint32_t barrier, uint32_t parity, uint32_t) {
  if (mbarrier_test(barrier, parity)) return true;
  emulated::yield();
  return mbarrier_test(barrier, parity);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_test(barrier, parity)) emulated::yield();
}

inline uint32_t remote_address(uint32_t address, uint32_t block) { return emulated::in_block(address, block); }
inline void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) { mbarrier_wait(barrier, parity); }

}  // namespace sparse_marlin::ptx
