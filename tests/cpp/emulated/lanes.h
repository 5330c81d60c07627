// A block of a CUDA kernel on the CPU, or a cluster of them: their threads are coroutines that take turns, warps in an order drawn anew
// each time.
//
// Device code reaches the GPU through the wrappers of csrc/device/ptx alone; the headers beside this one stand in for them, with the
// semantics that the PTX ISA gives each instruction. Asynchronous copies are done at once or some time later, as the generator has it:
// a wait that is missing shows, and so do bytes that are overwritten before they have been read. What this cannot show is the
// memory model (an access that overtakes another) and what the compiler makes of the code.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// The qualifiers of device code.
#undef __device__
#define __device__
#undef __global__
#define __global__
#undef __shared__
#define __shared__
#undef __forceinline__
#define __forceinline__ inline
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __maxnreg__
#define __maxnreg__(...)
#undef __grid_constant__
#define __grid_constant__
#define __CUDA_ARCH_FEAT_SM90_ALL 1

namespace emulated {
inline constexpr int kSharedBytes = 232 << 10;
inline constexpr int kMaxCluster = 8;
}  // namespace emulated
namespace sparse_marlin::device {
// What a kernel declares as its dynamic shared memory: that of the first block of a cluster, the others' behind it. A plain pointer to it,
// which is not taken for an address of shared memory, is right in blocks without a cluster alone.
inline uint8_t shared[emulated::kMaxCluster * emulated::kSharedBytes] __attribute__((aligned(1024)));
}  // namespace sparse_marlin::device

namespace emulated {

inline constexpr int kLanes = 32;
inline constexpr int kMaxWarps = 32;
inline constexpr int kStackBytes = 64 << 10;
inline constexpr long kMostTurns = 4'000'000;  // of a block: more is a deadlock

struct Index {
  int x = 0;
};
inline Index thread, block, grid;
inline int rank;  // of the block in its cluster
inline int cluster_blocks, block_threads;
inline std::mt19937 random(0);

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("block " + std::to_string(block.x) + ", thread " + std::to_string(thread.x) + ": " + what);
}
inline void check(bool holds, const char* what) {
  if (!holds) fail(what);
}

// --- threads ---------------------------------------------------------------------------------------------------------------
struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool done = false;
};
inline std::vector<Thread> threads;  // [block of the cluster][thread]
inline Thread& current() { return threads[rank * block_threads + thread.x]; }
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline std::string failure;

inline void yield() { swapcontext(&current().context, &scheduler); }
inline void run_thread() {
  try {
    kernel();
  } catch (const std::exception& error) {  // an exception must not leave its stack
    if (failure.empty()) failure = error.what();
  }
  current().done = true;
  yield();
}

// --- meetings --------------------------------------------------------------------------------------------------------------
// Of all lanes of a warp, where each brings some words and sees those of the others. Two sets: nobody can be two meetings ahead of one who
// still reads.
inline constexpr int kWords = 12;
struct Exchange {
  int arrived = 0;
  unsigned turn = 0;
  uint32_t words[2][kLanes][kWords];
};
inline Exchange exchanges[kMaxCluster][kMaxWarps];
struct Barrier {
  int arrived = 0;
  unsigned turn = 0;
};
inline Barrier barriers[kMaxCluster][16];
inline Barrier cluster_barrier;

template <int kCount>
const uint32_t (*meet(const uint32_t (&mine)[kCount]))[kWords] {
  static_assert(kCount <= kWords);
  Exchange& e = exchanges[rank][thread.x / kLanes];
  const unsigned turn = e.turn;
  std::copy(mine, mine + kCount, e.words[turn % 2][thread.x % kLanes]);
  if (++e.arrived == kLanes) {
    e.arrived = 0;
    ++e.turn;
  }
  while (e.turn == turn) yield();
  return e.words[turn % 2];
}
inline void arrive_at(Barrier& b, int count) {
  if (++b.arrived < count) return;
  b.arrived = 0;
  ++b.turn;
}
inline void wait_at(int id, int count) {
  Barrier& b = barriers[rank][id];
  const unsigned turn = b.turn;
  arrive_at(b, count);
  while (b.turn == turn) yield();
}

// --- shared memory ---------------------------------------------------------------------------------------------------------
inline constexpr uint32_t kSharedBase = 1024;  // an address of 0 is a mistake
inline constexpr int kRankShift = 24;          // of an address in another block: above it, the rank + 1
inline uint32_t in_block(uint32_t address, int of) {
  return address >> kRankShift != 0 ? address : address | static_cast<uint32_t>(of + 1) << kRankShift;
}
inline char* at(uint32_t address, uint32_t bytes) {
  const uint32_t full = in_block(address, rank), local = full & ((1u << kRankShift) - 1);
  check(local >= kSharedBase && local + bytes <= kSharedBase + kSharedBytes, "outside shared memory");
  check(bytes > 16 || local % bytes == 0, "not aligned");
  return reinterpret_cast<char*>(sparse_marlin::device::shared) + ((full >> kRankShift) - 1) * kSharedBytes +
         (local - kSharedBase);
}
template <typename T>
T load(uint32_t address) {
  T value;
  std::memcpy(&value, at(address, sizeof(T)), sizeof(T));
  return value;
}
template <typename T>
void store(uint32_t address, const T& value) {
  std::memcpy(at(address, sizeof(T)), &value, sizeof(T));
}

// --- mbarriers -------------------------------------------------------------------------------------------------------------
struct MBarrier {
  int arrivals = 0, pending = 0;
  long bytes = 0;
  unsigned phase = 0;
};
inline std::map<uint32_t, MBarrier> mbarriers;
inline MBarrier& mbarrier(uint32_t address) {
  const auto found = mbarriers.find(in_block(address, rank));
  if (found == mbarriers.end()) fail("a barrier that is not initialized");
  return found->second;
}
inline void advance(MBarrier& b) {
  check(b.pending >= 0, "more arrivals than a phase has");
  if (b.pending > 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.arrivals;
}

// --- asynchronous copies ---------------------------------------------------------------------------------------------------
inline std::vector<std::function<void()>> copies;
inline void copy(std::function<void()> run) {
  if (random() % 2 == 0) {
    run();
  } else {
    copies.push_back(std::move(run));
  }
}
inline void do_a_copy() {
  if (copies.empty()) return;
  const auto chosen = copies.begin() + random() % copies.size();
  const std::function<void()> run = *chosen;
  copies.erase(chosen);
  run();
}
// What a tensor map says; lies in a CUtensorMap.
struct TensorMap {
  const void* data;
  int64_t sizes[3], strides[3];  // in values; in bytes
  int box[3];
  bool swizzled;  // 128 bytes
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

// Runs a cluster to its end, by default of one block. Shared memory and barriers are as a block finds them: undefined.
inline void run_cluster(int index, int blocks, int count, const std::function<void()>& body, int size = 1) {
  grid.x = blocks;
  cluster_blocks = size;
  block_threads = count;
  kernel = body;
  failure.clear();
  mbarriers.clear();
  copies.clear();
  std::memset(sparse_marlin::device::shared, 0xff, sizeof(sparse_marlin::device::shared));
  for (auto& of_block : exchanges) {
    for (Exchange& e : of_block) e.arrived = 0;
  }
  for (auto& of_block : barriers) {
    for (Barrier& b : of_block) b.arrived = 0;
  }
  cluster_barrier = {};
  if (threads.size() < static_cast<size_t>(size * count)) threads.resize(size * count);
  for (int i = 0; i < size * count; ++i) {
    Thread& t = threads[i];
    t.done = false;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = t.stack.size();
    t.context.uc_link = nullptr;
    makecontext(&t.context, run_thread, 0);
  }
  std::vector<int> warps(size * count / kLanes);  // of all blocks
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = static_cast<int>(i);
  int left = size * count;
  for (long turn = 0; left > 0 && failure.empty(); ++turn) {
    if (turn == kMostTurns) throw std::runtime_error("cluster " + std::to_string(index) + ": nobody gets on");
    std::shuffle(warps.begin(), warps.end(), random);
    for (const int warp : warps) {
      for (int lane = 0; lane < kLanes; ++lane) {
        rank = warp * kLanes / count;
        block.x = index * size + rank;
        thread.x = warp * kLanes % count + lane;
        if (current().done) continue;
        swapcontext(&scheduler, &current().context);
        left -= current().done ? 1 : 0;
      }
    }
    if (random() % 4 == 0) do_a_copy();
  }
  if (!failure.empty()) throw std::runtime_error(failure);
  while (!copies.empty()) do_a_copy();
}

}  // namespace emulated

#define threadIdx emulated::thread
#define blockIdx emulated::block
#define gridDim emulated::grid
#define blockDim (emulated::Index{emulated::block_threads})

// --- intrinsics of CUDA C++ ------------------------------------------------------------------------------------------------
using std::max;
using std::min;
inline void* __cvta_shared_to_generic(uint32_t address) { return emulated::at(address, 1); }
inline int __shfl_sync(unsigned, int value, int from) {
  return static_cast<int>(emulated::meet<1>({static_cast<uint32_t>(value)})[from][0]);
}
inline void __syncwarp() { emulated::meet<1>({0}); }
inline bool __all_sync(unsigned, bool holds) {
  const auto all = emulated::meet<1>({holds});
  return std::all_of(all, all + emulated::kLanes, [](const auto& words) { return words[0] != 0; });
}
inline uint32_t __shfl_down_sync(unsigned, uint32_t value, int by) {
  const int lane = emulated::thread.x % emulated::kLanes;
  const auto all = emulated::meet<1>({value});
  return lane + by < emulated::kLanes ? all[lane + by][0] : value;
}
inline void __syncthreads() { emulated::wait_at(0, emulated::block_threads); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= (both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
template <typename To, typename From>
To bits_as(From value) {
  To to;
  std::memcpy(static_cast<void*>(&to), &value, sizeof(To));
  return to;
}
inline float __uint_as_float(uint32_t bits) { return bits_as<float>(bits); }
inline uint32_t __float_as_uint(float value) { return bits_as<uint32_t>(value); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { emulated::yield(); }
inline unsigned long long atomicExch(unsigned long long* to, unsigned long long value) {
  return std::exchange(*to, value);
}
inline uint32_t atomicAdd(uint32_t* to, uint32_t value) { return std::exchange(*to, *to + value); }
