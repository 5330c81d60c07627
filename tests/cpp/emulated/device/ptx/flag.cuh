#pragma once
#include <cstdint>

namespace sparse_marlin::ptx {

inline void flag_raise(uint64_t* flag, uint64_t token) { *flag = token; }
inline bool flag_raised(const uint64_t* flag, uint64_t token) { return *flag == token; }
inline void flag_clear(uint64_t* flag) { *flag = 0; }

}  // namespace sparse_marlin::ptx
