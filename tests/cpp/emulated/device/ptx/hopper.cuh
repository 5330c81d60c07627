#pragma once
#include "emulated/lanes.h"

namespace sparse_marlin::ptx {

inline bool elect_one() {
  __syncwarp();  // all lanes come here
  return emulated::thread.x % emulated::kLanes == 0;
}
inline int cluster_block() { return 0; }
inline int cluster_id() { return emulated::block.x; }
inline void cluster_arrive() {}
inline void cluster_wait() {}
inline void store_remote_counted(uint32_t, uint32_t, float4) { emulated::fail("a cluster of one block"); }

}  // namespace sparse_marlin::ptx
