// What the tests of the core share: random sparse weights, plain and threaded loops, and owners of the buffers that the
// core's parameter structs point at.
#pragma once
#include <algorithm>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "cpu/gemm_cpu.h"
#include "cpu/half.h"
#include "pack/pack_24.h"

namespace sparse_marlin::test {

inline void serial_for(int64_t count, int64_t /*grain*/, const std::function<void(int64_t, int64_t)>& body) {
  if (count > 0) body(0, count);
}

// Splits into `threads` uneven ranges, each on its own thread: what a thread pool may do.
inline ParallelFor threaded_for(int threads) {
  return [threads](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    const int64_t step = std::max<int64_t>(std::max<int64_t>(grain, 1), (count + threads - 1) / threads);
    std::vector<std::thread> pool;
    for (int64_t begin = 0; begin < count; begin += step) {
      pool.emplace_back([&body, begin, end = std::min(count, begin + step)] { body(begin, end); });
    }
    for (std::thread& thread : pool) thread.join();
  };
}

// 2:4-sparse codes over the whole range; every mask of at most two non-zeros occurs.
inline std::vector<int8_t> random_codes(int64_t n, int64_t k, int num_bits, uint32_t seed) {
  std::mt19937 rng(seed);
  std::uniform_int_distribution<int> code(format::code_min(num_bits), format::code_max(num_bits));
  std::uniform_int_distribution<int> position(0, format::kQuad - 1);
  std::vector<int8_t> codes(static_cast<size_t>(n * k), 0);
  for (int64_t quad = 0; quad < n * k / format::kQuad; ++quad) {
    for (int i = 0; i < format::kKeptPerQuad; ++i) {
      codes[static_cast<size_t>(quad * format::kQuad + position(rng))] = static_cast<int8_t>(code(rng));
    }
  }
  return codes;
}

struct Packed {
  int64_t n = 0;
  int64_t k = 0;
  int num_bits = 4;
  std::vector<uint32_t> words;
  PackStatus status;

  int64_t row_words() const { return format::packed_row_words(k, num_bits); }
};

// Packs any weight; `scales` are float32, [num_groups, n].
template <class Value>
Packed pack_values(const std::vector<Value>& weight, WeightType type, const std::vector<float>& scales, int64_t n,
                   int64_t k, int group_size, int num_bits, const ParallelFor& parallel_for = serial_for) {
  Packed packed{n, k, num_bits, {}, {}};
  constexpr uint32_t kUntouched = 0xdeadbeef;
  packed.words.assign(static_cast<size_t>(format::row_tiles(n) * packed.row_words()), kUntouched);
  const PackParams params{weight.data(), type,     scales.data(),      DType::kFloat32, n, k,
                          group_size,    num_bits, packed.words.data()};
  packed.status = pack_cpu(params, parallel_for);
  return packed;
}

inline Packed pack_codes(const std::vector<int8_t>& codes, int64_t n, int64_t k, int num_bits,
                         const ParallelFor& parallel_for = serial_for) {
  return pack_values(codes, WeightType::kCodes, std::vector<float>(static_cast<size_t>(n), 1.0f), n, k, kChannelwise,
                     num_bits, parallel_for);
}

inline std::vector<int8_t> unpack(const Packed& packed, PackStatus* status,
                                  const ParallelFor& parallel_for = serial_for) {
  std::vector<int8_t> codes(static_cast<size_t>(packed.n * packed.k), 99);
  const UnpackParams params{packed.words.data(), packed.row_words(), packed.n, packed.k, packed.num_bits, codes.data()};
  *status = unpack_cpu(params, parallel_for);
  return codes;
}

}  // namespace sparse_marlin::test
