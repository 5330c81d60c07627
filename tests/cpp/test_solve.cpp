// The inner loops of compression: every instruction set gives what the portable one gives, whatever the number of
// columns, and writes nothing beside its columns. That they are right is compared with torch in
// tests/test_compress_solvers.py.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "cpu/solve.h"

namespace sparse_marlin {
namespace {

constexpr int64_t kK = 16, kStride = 80;
constexpr float kUntouched = -77.0f;

const ParallelFor kHalves = [](int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  if (count / 2 > 0) body(0, count / 2);
  body(count / 2, count);
};

std::vector<float> random(int64_t count, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

// A x A^T + 1
std::vector<float> positive_definite() {
  const std::vector<float> a = random(kK * kK, 1);
  std::vector<float> out(kK * kK);
  for (int64_t i = 0; i < kK; ++i) {
    for (int64_t j = 0; j < kK; ++j) {
      for (int64_t l = 0; l < kK; ++l) out[i * kK + j] += a[i * kK + l] * a[j * kK + l] / kK;
      if (i == j) out[i * kK + j] += 1;
    }
  }
  return out;
}

void expect_like(const std::vector<float>& found, const std::vector<float>& wanted, int64_t n) {
  for (int64_t row = 0; row < kK; ++row) {
    for (int64_t column = 0; column < kStride; ++column) {
      const float value = found[row * kStride + column];
      if (column < n) {
        ASSERT_NEAR(value, wanted[row * kStride + column], 1e-5f) << row << ", " << column;
      } else {
        ASSERT_EQ(value, kUntouched) << row << ", " << column;
      }
    }
  }
}

class Solve : public testing::TestWithParam<std::tuple<CpuIsa, int64_t>> {
 protected:
  void SetUp() override {
    if (!cpu_isa_available(isa)) GTEST_SKIP();
  }
  CpuIsa isa = std::get<0>(GetParam());
  int64_t n = std::get<1>(GetParam());
};

TEST_P(Solve, Descends) {
  const std::vector<float> matrix = positive_definite(), gradient = random(kK * kStride, 2);
  std::vector<float> codes[2], moved[2];
  for (int i = 0; i < 2; ++i) {
    codes[i].assign(kK * kStride, kUntouched);
    for (int64_t row = 0; row < kK; ++row) std::fill_n(codes[i].begin() + row * kStride, n, 0.0f);
    moved[i].assign(kK * kStride, kUntouched);
    const DescentParams params{kK,
                               n,
                               -8,
                               7,
                               1e-6f,
                               {matrix.data(), kK},
                               {gradient.data(), kStride},
                               {codes[i].data(), kStride},
                               {moved[i].data(), kStride}};
    descend_quads(params, kHalves, i == 0 ? CpuIsa::kPortable : isa);
  }
  expect_like(codes[1], codes[0], n);
  expect_like(moved[1], moved[0], n);
  EXPECT_TRUE(std::any_of(codes[1].begin(), codes[1].begin() + n, [](float code) { return code != 0; }));
}

TEST_P(Solve, Projects) {
  const std::vector<float> sought = random(kK * kStride, 3), target = random(kK * kStride, 4);
  std::vector<float> step = random(kK * kStride, 5), carried[2], behind[2];
  for (float& value : step) value = std::fabs(value) + 0.05f;
  for (const bool free : {false, true}) {
    for (int i = 0; i < 2; ++i) {
      carried[i].assign(kK * kStride, kUntouched);
      behind[i].assign(kK * kStride, kUntouched);
      const ProjectionParams params{kK,
                                    n,
                                    -8,
                                    7,
                                    0.7f,
                                    {sought.data(), kStride},
                                    {target.data(), kStride},
                                    {free ? nullptr : step.data(), kStride},
                                    {carried[i].data(), kStride},
                                    {behind[i].data(), kStride}};
      project_quads(params, kHalves, i == 0 ? CpuIsa::kPortable : isa);
    }
    expect_like(carried[1], carried[0], n);
    expect_like(behind[1], behind[0], n);
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, Solve,
                         testing::Combine(testing::Values(CpuIsa::kPortable, CpuIsa::kAvx2, CpuIsa::kAvx512),
                                          testing::Values(1, 7, 8, 9, 64, 71)));

}  // namespace
}  // namespace sparse_marlin
