// Values and a tag that says they are there, which blocks of a grid hand each other through global memory in one access of 16 bytes (PTX
// ISA, "ld" and "st" of .b128): who finds the tag has the values, without a fence and without a second access.
#pragma once
#include <cstdint>

namespace sparse_marlin::ptx {

struct alignas(16) Packet {
  uint2 values;
  uint64_t tag;
};

__device__ __forceinline__ void packet_store(Packet* to, uint2 values, uint64_t tag) {
  asm volatile(
      "{\n.reg .b128 p;\n.reg .b64 v;\nmov.b64 v, {%1, %2};\nmov.b128 p, {v, %3};\nst.relaxed.gpu.global.b128 [%0], "
      "p;\n}" ::"l"(to),
      "r"(values.x), "r"(values.y), "l"(tag)
      : "memory");
}
__device__ __forceinline__ Packet packet_load(const Packet* from) {
  Packet found;
  asm volatile(
      "{\n.reg .b128 p;\n.reg .b64 v;\nld.relaxed.gpu.global.b128 p, [%3];\nmov.b128 {v, %2}, p;\nmov.b64 {%0, %1}, "
      "v;\n}"
      : "=r"(found.values.x), "=r"(found.values.y), "=l"(found.tag)
      : "l"(from)
      : "memory");
  return found;
}

}  // namespace sparse_marlin::ptx
