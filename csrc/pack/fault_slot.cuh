// How a kernel that packs or unpacks tells its caller the first fault, and the host side of such a call.
#pragma once
#include <cuda_runtime.h>

#include <limits>
#include <string>

#include "format/packed_24.h"
#include "pack/pack_core.h"

namespace sparse_marlin::pack {

__device__ inline void report(uint64_t fault, uint64_t* slot) {
  static_assert(sizeof(unsigned long long) == sizeof(uint64_t));
  if (fault != kNoFault) atomicMin(reinterpret_cast<unsigned long long*>(slot), static_cast<unsigned long long>(fault));
}

// Collects the first CUDA error of a sequence of calls.
class CudaCalls {
 public:
  explicit CudaCalls(std::string* error) : error_(error) { error_->clear(); }
  // Whether everything so far went well; `what` names the call in the message.
  bool ok(cudaError_t result, const char* what) {
    if (result != cudaSuccess && error_->empty()) *error_ = std::string(what) + ": " + cudaGetErrorString(result);
    return error_->empty();
  }

 private:
  std::string* error_;
};

// Blocks of a grid with one a tile, or 0 with a message where a grid cannot hold them.
inline unsigned tile_blocks(int64_t n, int64_t k, std::string* error) {
  const int64_t tiles = format::row_tiles(n) * format::col_tiles(k);
  if (tiles <= std::numeric_limits<int>::max()) return static_cast<unsigned>(tiles);
  *error = "expected at most 2^31 - 1 tiles of 64 x 128, got " + std::to_string(tiles);
  return 0;
}

// Where kernels leave the first fault: host memory that the device reaches, so that a call needs no copy. One a thread, because a
// call waits for its kernel.
struct FaultSlot {
  uint64_t* value = nullptr;
  ~FaultSlot() { cudaFreeHost(value); }

  // Null after an error.
  static uint64_t* cleared(CudaCalls& calls) {
    thread_local FaultSlot slot;
    constexpr unsigned kFlags = cudaHostAllocMapped | cudaHostAllocPortable;
    if (slot.value == nullptr &&
        !calls.ok(cudaHostAlloc(reinterpret_cast<void**>(&slot.value), sizeof(uint64_t), kFlags), "fault slot")) {
      return nullptr;
    }
    *slot.value = kNoFault;
    return slot.value;
  }
};

// What the kernel launched last left in the slot.
inline uint64_t wait_for(const uint64_t* slot, cudaStream_t stream, CudaCalls& calls) {
  if (!calls.ok(cudaGetLastError(), "launching the kernel")) return kNoFault;
  if (!calls.ok(cudaStreamSynchronize(stream), "waiting for the stream")) return kNoFault;
  return *slot;
}

}  // namespace sparse_marlin::pack
