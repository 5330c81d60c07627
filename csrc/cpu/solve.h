// The two inner loops of compression that are long chains of small operations: on a CPU, torch's operators spend most of
// their time on starting each other and on intermediate results. Their twins in torch, which a GPU runs, are in
// python/sparse_marlin/compress (descent.py and admm.py) and say what is computed and why. No torch.
#pragma once
#include <cstdint>

#include "cpu/gemm_cpu.h"

namespace sparse_marlin {

// A matrix of `stride` floats from row to row, its columns side by side.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

// Coordinate descent over the quads of a block of K. Everything is [k, n] but `matrix` [k, k], which is symmetric.
struct DescentParams {
  int64_t k;  // whole quads
  int64_t n;
  float low, high;  // codes
  float margin;     // relative: a gain that is less is rounding
  Rows<const float> matrix;
  Rows<const float> gradient;
  Rows<float> codes;
  Rows<float> moved;  // written: the change of the codes
};
void descend_quads(const DescentParams& params, const ParallelFor& parallel_for, CpuIsa isa = CpuIsa::kBest);

// The step of ADMM after its product: `sought` is projected on the grid of `step`, two of four kept, and the state of
// the next product follows. Everything is [k, n].
struct ProjectionParams {
  int64_t k;  // whole quads
  int64_t n;
  float low, high;  // codes
  float ratio;      // rho before over rho now
  Rows<const float> sought;
  Rows<const float> target;
  Rows<const float> step;  // what one code is worth; data == nullptr: values are free
  Rows<float> carried;     // written
  Rows<float> behind;      // written
};
void project_quads(const ProjectionParams& params, const ParallelFor& parallel_for, CpuIsa isa = CpuIsa::kBest);

}  // namespace sparse_marlin
