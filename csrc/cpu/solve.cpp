// One implementation in vectors of the compiler's, compiled for each instruction set: lanes are columns, which do not
// depend on each other.
#include "cpu/solve.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/kernels.h"
#include "format/packed_24.h"

namespace sparse_marlin {
namespace {

using format::kQuad;

constexpr int kLanes = 8;  // a vector of AVX2: compilers take wider ones apart badly where the processor has none
constexpr int64_t kTaskColumns = 64;      // of the descent; a cache line and more, so that threads share none
constexpr int64_t kTaskValues = 1 << 15;  // of the projection
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

// The functions below are compiled into their callers, for the callers' instruction set.
#define SPARSE_MARLIN_INLINE __attribute__((always_inline)) inline

SPARSE_MARLIN_INLINE void load(const float* from, int64_t count, Lanes& to) {
  if (count >= kLanes) {
    std::memcpy(&to, from, sizeof(Lanes));
  } else {
    to = Lanes{};
    std::memcpy(&to, from, static_cast<size_t>(count) * sizeof(float));
  }
}

SPARSE_MARLIN_INLINE void store(const Lanes& from, int64_t count, float* to) {
  std::memcpy(to, &from, static_cast<size_t>(std::min<int64_t>(count, kLanes)) * sizeof(float));
}

SPARSE_MARLIN_INLINE void clamp(float low, float high, Lanes& x) {
  const Lanes lows = Lanes{} + low, highs = Lanes{} + high;
  x = x > lows ? x : lows;
  x = x < highs ? x : highs;
}

// The nearest code, of two equally near the even one. Adding 1.5 * 2^23 leaves no bits for fractions.
SPARSE_MARLIN_INLINE void nearest_code(float low, float high, Lanes& x) {
  constexpr float kOnes = 0x1.8p23f;
  clamp(low, high, x);
  x = (x + kOnes) - kOnes;
}

SPARSE_MARLIN_INLINE void greater(const Lanes& a, const Lanes& b, Lanes& out) { out = a > b ? a : b; }
SPARSE_MARLIN_INLINE void less(const Lanes& a, const Lanes& b, Lanes& out) { out = a < b ? a : b; }

// For a quad that is zero, with `slope` there: the best pair of positions with the best codes, and what it is worth.
SPARSE_MARLIN_INLINE void best_pair(const DescentParams& p, int64_t start, const Lanes (&slope)[kQuad],
                                    Lanes (&best)[kQuad], Lanes& least) {
  bool first_pair = true;
#pragma GCC unroll 4
  for (int u = 0; u < kQuad; ++u) {
#pragma GCC unroll 4
    for (int v = 0; v < kQuad; ++v) {
      if (u == v) continue;
      const float uu = p.matrix[start + u][start + u], vv = p.matrix[start + v][start + v];
      const float uv = p.matrix[start + u][start + v], determinant = uu * vv - uv * uv;
      // The first is rounded at the optimum of the pair, the second at its optimum given the first.
      Lanes one = slope[u] * (-vv / determinant) + slope[v] * (uv / determinant);
      nearest_code(p.low, p.high, one);
      Lanes two = slope[v] * (-1 / vv) + one * (-uv / vv);
      nearest_code(p.low, p.high, two);
      const Lanes worth = (slope[u] + one * (0.5f * uu) + two * uv) * one + (slope[v] + two * (0.5f * vv)) * two;
      const auto better = first_pair ? worth == worth : worth < least;
      least = better ? worth : least;
#pragma GCC unroll 4
      for (int i = 0; i < kQuad; ++i) {
        const Lanes value = i == u ? one : i == v ? two : Lanes{};
        best[i] = better ? value : best[i];
      }
      first_pair = false;
    }
  }
}

// `count` columns from `column` on. `slopes`: k vectors of scratch, the gradient as it changes.
SPARSE_MARLIN_INLINE void descend_lanes(const DescentParams& p, int64_t column, int64_t count, Lanes* slopes) {
  for (int64_t row = 0; row < p.k; ++row) load(p.gradient[row] + column, count, slopes[row]);
  for (int64_t start = 0; start < p.k; start += kQuad) {
    Lanes now[kQuad], slope[kQuad], best[kQuad] = {}, least = {}, standing = {};
    for (int i = 0; i < kQuad; ++i) load(p.codes[start + i] + column, count, now[i]);
    for (int i = 0; i < kQuad; ++i) {
      Lanes pull = {};
      for (int j = 0; j < kQuad; ++j) pull += now[j] * p.matrix[start + i][start + j];
      slope[i] = slopes[start + i] - pull;
      standing += (slope[i] + pull * 0.5f) * now[i];
    }
    best_pair(p, start, slope, best, least);
    const auto better = least * (1 - p.margin) < standing;
    Lanes change[kQuad];
    for (int i = 0; i < kQuad; ++i) {
      change[i] = better ? best[i] - now[i] : Lanes{};
      store(now[i] + change[i], count, p.codes[start + i] + column);
      store(change[i], count, p.moved[start + i] + column);
    }
    for (int64_t row = start + kQuad; row < p.k; ++row) {
      Lanes slope_there = slopes[row];
      for (int i = 0; i < kQuad; ++i) slope_there += change[i] * p.matrix[start + i][row];
      slopes[row] = slope_there;
    }
  }
}

SPARSE_MARLIN_INLINE void descend_columns(const DescentParams& p, int64_t begin, int64_t end, Lanes* slopes) {
  for (int64_t column = begin; column < end; column += kLanes) {
    descend_lanes(p, column, std::min<int64_t>(end - column, kLanes), slopes);
  }
}

// As keep_about_two: of equal ones at the border all stay.
SPARSE_MARLIN_INLINE void second_largest(const Lanes (&score)[kQuad], Lanes& second) {
  static_assert(kQuad == 4);
  Lanes high01, high23, low01, low23, of_highs, of_lows;
  greater(score[0], score[1], high01);
  greater(score[2], score[3], high23);
  less(score[0], score[1], low01);
  less(score[2], score[3], low23);
  less(high01, high23, of_highs);
  greater(low01, low23, of_lows);
  greater(of_highs, of_lows, second);
}

SPARSE_MARLIN_INLINE void project_lanes(const ProjectionParams& p, int64_t row, int64_t column, int64_t count) {
  Lanes sought[kQuad], projected[kQuad], score[kQuad], second;
  for (int i = 0; i < kQuad; ++i) {
    load(p.sought[row + i] + column, count, sought[i]);
    projected[i] = sought[i];
    if (p.step.data != nullptr) {
      Lanes step;
      load(p.step[row + i] + column, count, step);
      projected[i] = sought[i] / step;
      nearest_code(p.low, p.high, projected[i]);
      projected[i] *= step;
    }
    // What keeping a weight is worth: x^2 - (x - q)^2.
    score[i] = (2 * sought[i] - projected[i]) * projected[i];
  }
  second_largest(score, second);
  for (int i = 0; i < kQuad; ++i) {
    const Lanes kept = score[i] >= second ? projected[i] : Lanes{};
    Lanes carried;
    load(p.target[row + i] + column, count, carried);
    carried += (sought[i] - kept) * p.ratio;
    store(carried, count, p.carried[row + i] + column);
    store(kept - carried, count, p.behind[row + i] + column);
  }
}

SPARSE_MARLIN_INLINE void project_rows(const ProjectionParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin * kQuad; row < end * kQuad; row += kQuad) {
    for (int64_t column = 0; column < p.n; column += kLanes) project_lanes(p, row, column, p.n - column);
  }
}

struct SolveKernels {
  void (*descend)(const DescentParams& params, int64_t begin, int64_t end, Lanes* slopes);
  void (*project)(const ProjectionParams& params, int64_t begin, int64_t end);
};

#define SPARSE_MARLIN_SOLVE_KERNELS(name, ...)                                                         \
  __VA_ARGS__ void name##_descend(const DescentParams& p, int64_t begin, int64_t end, Lanes* slopes) { \
    descend_columns(p, begin, end, slopes);                                                            \
  }                                                                                                    \
  __VA_ARGS__ void name##_project(const ProjectionParams& p, int64_t begin, int64_t end) {             \
    project_rows(p, begin, end);                                                                       \
  }

SPARSE_MARLIN_SOLVE_KERNELS(portable)
#if defined(SPARSE_MARLIN_X86)
SPARSE_MARLIN_SOLVE_KERNELS(avx2, __attribute__((target("avx2,fma"))))
SPARSE_MARLIN_SOLVE_KERNELS(avx512, __attribute__((target("avx512f,avx2,fma"))))
#endif

SolveKernels kernels_of(CpuIsa isa) {
#if defined(SPARSE_MARLIN_X86)
  if (isa == CpuIsa::kBest) isa = cpu_isa_best();
  if (isa == CpuIsa::kAvx512 || isa == CpuIsa::kAvx512Bf16) return {avx512_descend, avx512_project};
  if (isa == CpuIsa::kAvx2) return {avx2_descend, avx2_project};
#endif
  return {portable_descend, portable_project};
}

}  // namespace

void descend_quads(const DescentParams& params, const ParallelFor& parallel_for, CpuIsa isa) {
  const SolveKernels kernels = kernels_of(isa);
  const int64_t tasks = (params.n + kTaskColumns - 1) / kTaskColumns;
  parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
    const auto slopes = std::make_unique<Lanes[]>(static_cast<size_t>(params.k));
    kernels.descend(params, begin * kTaskColumns, std::min(end * kTaskColumns, params.n), slopes.get());
  });
}

void project_quads(const ProjectionParams& params, const ParallelFor& parallel_for, CpuIsa isa) {
  const SolveKernels kernels = kernels_of(isa);
  const int64_t grain = std::max<int64_t>(1, kTaskValues / std::max<int64_t>(params.n * kQuad, 1));
  parallel_for(params.k / kQuad, grain, [&](int64_t begin, int64_t end) { kernels.project(params, begin, end); });
}

}  // namespace sparse_marlin
