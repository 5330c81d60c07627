#pragma once
#include "emulated/lanes.h"

namespace sparse_marlin::ptx {

struct alignas(16) Packet {
  uint2 values;
  uint64_t tag;
};

inline void packet_store(Packet* to, uint2 values, uint64_t tag) {
  emulated::check(reinterpret_cast<uintptr_t>(to) % sizeof(Packet) == 0, "not aligned");
  *to = {values, tag};
}
// Sometimes a packet is not there yet.
inline Packet packet_load(const Packet* from) { return emulated::random() % 4 == 0 ? Packet{} : *from; }

}  // namespace sparse_marlin::ptx
