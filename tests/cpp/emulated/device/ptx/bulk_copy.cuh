#pragma once
#include "emulated/lanes.h"

namespace sparse_marlin::ptx {

inline void arrived(uint32_t barrier, long bytes) {
  emulated::MBarrier& b = emulated::mbarrier(barrier);
  b.bytes -= bytes;
  emulated::advance(b);
}
inline void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t barrier, uint64_t = 0) {
  emulated::check(dst % 16 == 0 && bytes % 16 == 0 && reinterpret_cast<uintptr_t>(src) % 16 == 0,
                  "a bulk copy is of multiples of 16 bytes");
  dst = emulated::in_block(dst, emulated::rank);  // whoever runs when the copy is done
  barrier = emulated::in_block(barrier, emulated::rank);
  emulated::copy([=] {
    std::memcpy(emulated::at(dst, bytes), src, bytes);
    arrived(barrier, bytes);
  });
}
inline std::map<const char*, uint32_t> prefetched;
inline void bulk_prefetch(const void* src, uint32_t bytes) {
  emulated::check(bytes > 0 && bytes % 16 == 0 && reinterpret_cast<uintptr_t>(src) % 16 == 0,
                  "a bulk copy is of multiples of 16 bytes");
  emulated::check(prefetched.emplace(static_cast<const char*>(src), bytes).second, "prefetched twice");
}
inline void tensor_load_3d(uint32_t dst, const CUtensorMap* map, int x, int y, int z, uint32_t barrier) {
  emulated::TensorMap m;
  std::memcpy(&m, map, sizeof(m));
  dst = emulated::in_block(dst, emulated::rank);
  barrier = emulated::in_block(barrier, emulated::rank);
  emulated::copy([=] {
    uint32_t offset = 0;
    for (int k = z; k < z + m.box[2]; ++k) {
      for (int j = y; j < y + m.box[1]; ++j) {
        for (int i = x; i < x + m.box[0]; ++i, offset += sizeof(uint16_t)) {
          const bool inside = i < m.sizes[0] && j < m.sizes[1] && k < m.sizes[2];
          uint16_t value = 0;
          const char* from = static_cast<const char*>(m.data) + i * m.strides[0] + j * m.strides[1] + k * m.strides[2];
          if (inside) std::memcpy(&value, from, sizeof(value));
          const uint32_t to = dst + offset;
          emulated::store(m.swizzled ? to ^ (to >> 7 & 7) << 4 : to, value);
        }
      }
    }
    arrived(barrier, offset);
  });
}
inline void tensor_load(uint32_t dst, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  tensor_load_3d(dst, map, x, y, 0, barrier);
}
inline void prefetch_map(const CUtensorMap*) {}

}  // namespace sparse_marlin::ptx
