// The CPU multiplication, every instruction set this processor has, against sums over the codes in float64.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "cpu/half.h"
#include "support.h"

namespace sparse_marlin {
namespace {

using namespace format;

// An array of `type`, filled from and read as float32.
struct Array {
  DType type;
  std::vector<char> bytes;

  Array(DType t, int64_t count) : type(t), bytes(static_cast<size_t>(count * dtype_bytes(t)), 0) {}
  float operator[](int64_t i) const { return load_float(bytes.data(), type, i); }
  void set(int64_t i, float value) { store_float(bytes.data(), type, i, value); }
};

// A multiplication with its inputs. Tests fill codes, scales, acts and bias, then run.
struct Case {
  Problem problem;
  std::vector<int8_t> codes;
  Array acts, scales, bias;

  explicit Case(const Problem& p)
      : problem(p),
        codes(static_cast<size_t>(p.n * p.k), 0),
        acts(p.dtype, p.m * p.k),
        scales(p.dtype, num_groups(p.k, p.group_size) * p.n),
        bias(p.dtype, p.n) {
    for (int64_t i = 0; i < num_groups(p.k, p.group_size) * p.n; ++i) scales.set(i, 1.0f);
  }

  void randomize(uint32_t seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> scale(0.01f, 0.1f);
    codes = test::random_codes(problem.n, problem.k, problem.num_bits, seed);
    for (int64_t i = 0; i < problem.m * problem.k; ++i) acts.set(i, normal(rng));
    for (int64_t i = 0; i < num_groups(problem.k, problem.group_size) * problem.n; ++i) scales.set(i, scale(rng));
    for (int64_t i = 0; i < problem.n; ++i) bias.set(i, normal(rng));
  }

  int64_t group(int64_t col) const { return problem.group_size == kChannelwise ? 0 : col / problem.group_size; }
  double weight(int64_t row, int64_t col) const {
    return codes[static_cast<size_t>(row * problem.k + col)] *
           static_cast<double>(scales[group(col) * problem.n + row]);
  }

  // `extra_words` separate two rows of tiles, as in a slice along k of a wider packed tensor; they are not valid words.
  template <class Gemm>
  Array run(const Gemm& gemm, int64_t extra_words = 0) const {
    const test::Packed packed = test::pack_codes(codes, problem.n, problem.k, problem.num_bits);
    EXPECT_TRUE(packed.status.ok());
    const int64_t stride = packed.row_words() + extra_words;
    std::vector<uint32_t> words(static_cast<size_t>(row_tiles(problem.n) * stride), 0xffffffffu);
    for (int64_t t = 0; t < row_tiles(problem.n); ++t) {
      std::copy_n(packed.words.begin() + t * packed.row_words(), packed.row_words(), words.begin() + t * stride);
    }
    Array out(problem.dtype, problem.m * problem.n);
    std::fill(out.bytes.begin(), out.bytes.end(), char{0x7f});  // NaN or absurd: an element that is not written shows
    const GemmParams params{
        acts.bytes.data(), words.data(), stride, scales.bytes.data(), problem.has_bias ? bias.bytes.data() : nullptr,
        out.bytes.data(),  nullptr};
    gemm(params);
    return out;
  }

  Array run_isa(CpuIsa isa, const ParallelFor& parallel_for = test::serial_for, int64_t extra_words = 0) const {
    return run([&](const GemmParams& params) { gemm_cpu(problem, params, parallel_for, isa); }, extra_words);
  }
};

constexpr double kSubnormalUnit = 0x1p-24;  // of float16, the coarsest

double rounding_unit(DType type) {
  return type == DType::kFloat32 ? 0x1p-24 : type == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
}

// Every element within one rounding to the output type plus what float32 accumulation can lose at worst: a rounding for
// each of the 64 terms of a slice, for each slice, for the scale and for the bias, of the sum of magnitudes. That is a
// few millionths of it; a term is a few thousandths, so a misplaced or missing weight cannot hide, nor one that was
// rounded to half precision.
void expect_matches_codes(const Case& c, const Array& out, const std::string& what) {
  const Problem& p = c.problem;
  const double depth = static_cast<double>(kSliceQuads * kKeptPerQuad + col_tiles(p.k) + 2);
  for (int64_t row = 0; row < p.n; ++row) {
    for (int64_t token = 0; token < p.m; ++token) {
      double sum = p.has_bias ? c.bias[row] : 0.0, magnitude = std::abs(sum);
      for (int64_t col = 0; col < p.k; ++col) {
        if (c.codes[static_cast<size_t>(row * p.k + col)] == 0) continue;
        const double term = c.weight(row, col) * c.acts[token * p.k + col];
        sum += term;
        magnitude += std::abs(term);
      }
      const double allowed = rounding_unit(p.dtype) * std::abs(sum) + depth * 0x1p-24 * magnitude + kSubnormalUnit;
      ASSERT_NEAR(out[token * p.n + row], sum, allowed) << what << ": token " << token << ", row " << row;
    }
  }
}

std::vector<CpuIsa> available_isas() {
  std::vector<CpuIsa> isas;
  for (CpuIsa isa : {CpuIsa::kPortable, CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAvx512Bf16}) {
    if (cpu_isa_available(isa)) isas.push_back(isa);
  }
  return isas;
}

std::string name(const Problem& p, CpuIsa isa) {
  return std::string(cpu_isa_name(isa)) + " m=" + std::to_string(p.m) + " n=" + std::to_string(p.n) +
         " k=" + std::to_string(p.k) + " group=" + std::to_string(p.group_size) +
         " bits=" + std::to_string(p.num_bits) + " " + dtype_name(p.dtype);
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

// gemm_cpu.h says so: the instruction takes them for zero, where float32 does not.
TEST(GemmCpu, SubnormalBfloat16OfSeveralTokensIsZeroWhereItIsMultipliedAsSuch) {
  for (CpuIsa isa : available_isas()) {
    for (int64_t m : {1, 5}) {
      Case c({m, 16, 128, 128, 4, DType::kBFloat16, false});
      for (size_t i = 0; i < c.codes.size(); i += kQuad) c.codes[i] = 1;
      for (int64_t i = 0; i < m * 128; ++i) c.acts.set(i, 0x1p-130);  // 32 of them are 2^-125, a normal number
      const Array out = c.run_isa(isa);
      bool zero = true;
      for (int64_t i = 0; i < m * 16; ++i) zero &= out[i] == 0;
      EXPECT_EQ(zero, isa == CpuIsa::kAvx512Bf16 && m > 1) << name(c.problem, isa);
    }
  }
}

TEST(GemmCpu, PortableIsAlwaysThereAndBestIsAvailable) {
  EXPECT_TRUE(cpu_isa_available(CpuIsa::kPortable));
  EXPECT_TRUE(cpu_isa_available(cpu_isa_best()));
  EXPECT_STREQ(cpu_isa_name(CpuIsa::kBest), cpu_isa_name(cpu_isa_best()));
}

TEST(GemmCpu, ReferenceMatchesCodes) {
  for (int bits : {4, 8}) {
    for (DType dtype : kDTypes) {
      Case c({5, 35, 260, 64, bits, dtype, true});
      c.randomize(17);
      expect_matches_codes(c, c.run([&](const GemmParams& params) { gemm_reference(c.problem, params); }), "reference");
    }
  }
}

TEST(GemmCpu, GroupsBitsAndTypes) {
  for (CpuIsa isa : available_isas()) {
    for (int bits : {4, 8}) {
      for (DType dtype : kDTypes) {
        for (int group_size : kGroupSizes) {
          for (int64_t m : {1, 3}) {
            Case c({m, 83, 420, group_size, bits, dtype, m == 3});  // 420: every group size ends in a partial group
            c.randomize(static_cast<uint32_t>(group_size + bits + m));
            expect_matches_codes(c, c.run_isa(isa), name(c.problem, isa));
          }
        }
      }
    }
  }
}

TEST(GemmCpu, OddShapes) {
  const struct { int64_t n, k; } shapes[] = {{1, 4}, {7, 124}, {16, 128}, {17, 132}, {65, 576}, {192, 36}};
  for (CpuIsa isa : available_isas()) {
    for (int bits : {4, 8}) {
      for (const auto [n, k] : shapes) {
        for (DType dtype : kDTypes) {
          Case c({2, n, k, 128, bits, dtype, true});
          c.randomize(static_cast<uint32_t>(n + k));
          expect_matches_codes(c, c.run_isa(isa), name(c.problem, isa));
        }
      }
    }
  }
}

// Every size of the token blocks, their remainders, and more tokens than a chunk or a pass holds.
TEST(GemmCpu, AnyNumberOfTokens) {
  for (CpuIsa isa : available_isas()) {
    for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 127, 128, 129, 511, 512, 513, 650}) {
      Case c({m, 20, 140, 64, 4, DType::kFloat32, false});
      c.randomize(static_cast<uint32_t>(m));
      expect_matches_codes(c, c.run_isa(isa, test::threaded_for(3)), name(c.problem, isa));
    }
  }
}

TEST(GemmCpu, NoTokensWritesNothing) {
  for (CpuIsa isa : available_isas()) {
    Case c({0, 20, 128, 128, 4, DType::kFloat16, true});
    EXPECT_TRUE(c.run_isa(isa).bytes.empty());
  }
}

// acts = one-hot at column k brings out column k of the weight, exactly: a layout fault shows as a permutation.
TEST(GemmCpu, OneHotActivationsReadOneColumn) {
  for (CpuIsa isa : available_isas()) {
    for (int bits : {4, 8}) {
      Case c({kSliceCols + 4, 40, kSliceCols + 4, 128, bits, DType::kFloat32, false});
      c.codes = test::random_codes(c.problem.n, c.problem.k, bits, 23);
      for (int64_t i = 0; i < c.problem.m; ++i) c.acts.set(i * c.problem.k + i, 1.0f);
      const Array many = c.run_isa(isa);
      Case one({1, c.problem.n, c.problem.k, 128, bits, DType::kFloat32, false});
      one.codes = c.codes;
      for (int64_t token = 0; token < c.problem.m; ++token) {
        one.acts = Array(DType::kFloat32, c.problem.k);
        one.acts.set(token, 1.0f);
        const Array single = one.run_isa(isa);
        for (int64_t row = 0; row < c.problem.n; ++row) {
          const float expected = c.codes[static_cast<size_t>(row * c.problem.k + token)];
          ASSERT_EQ(many[token * c.problem.n + row], expected)
              << name(c.problem, isa) << " row " << row << " column " << token;
          ASSERT_EQ(single[row], expected) << name(one.problem, isa) << " row " << row << " column " << token;
        }
      }
    }
  }
}

// Weights that encode their coordinate (code = a function of row and column), activations that encode the column: exact
// in float32.
TEST(GemmCpu, WeightsThatEncodeTheirCoordinate) {
  for (CpuIsa isa : available_isas()) {
    for (int64_t m : {1, 5}) {
      Case c({m, 80, 256, kChannelwise, 8, DType::kFloat32, false});
      for (int64_t row = 0; row < 80; ++row) {
        for (int64_t quad = 0; quad < 64; ++quad) {
          const Pattern p = canonical_pattern((row + quad) % 2 == 0 ? 0b1010 : 0b0101);
          c.codes[static_cast<size_t>(row * 256 + quad * 4 + p.first)] = static_cast<int8_t>(row - 40);
          c.codes[static_cast<size_t>(row * 256 + quad * 4 + p.second)] = static_cast<int8_t>(quad + 1);
        }
      }
      for (int64_t i = 0; i < m * 256; ++i) c.acts.set(i, static_cast<float>((i * 37) % 64 - 20));
      const Array out = c.run_isa(isa);
      for (int64_t token = 0; token < m; ++token) {
        for (int64_t row = 0; row < 80; ++row) {
          double sum = 0;
          for (int64_t col = 0; col < 256; ++col) sum += c.weight(row, col) * c.acts[token * 256 + col];
          ASSERT_EQ(out[token * 80 + row], sum) << name(c.problem, isa) << " row " << row;
        }
      }
    }
  }
}

// scale = 1 + row + 100 * group with all codes 1: the result tells which groups and rows were used.
TEST(GemmCpu, ScalesThatEncodeTheirGroup) {
  for (CpuIsa isa : available_isas()) {
    for (int group_size : kGroupSizes) {
      for (int64_t m : {1, 2}) {
        Case c({m, 33, 544, group_size, 4, DType::kFloat32, false});
        const int64_t groups = num_groups(544, group_size);
        for (int64_t col = 0; col < 544; col += 2) {
          for (int64_t row = 0; row < 33; ++row) c.codes[static_cast<size_t>(row * 544 + col)] = 1;
        }
        for (int64_t i = 0; i < groups * 33; ++i) c.scales.set(i, static_cast<float>(1 + i % 33 + 100 * (i / 33)));
        for (int64_t i = 0; i < m * 544; ++i) c.acts.set(i, 1.0f);
        const Array out = c.run_isa(isa);
        for (int64_t row = 0; row < 33; ++row) {
          double sum = 0;
          for (int64_t col = 0; col < 544; ++col) sum += c.weight(row, col);
          for (int64_t token = 0; token < m; ++token)
            ASSERT_EQ(out[token * 33 + row], sum) << name(c.problem, isa) << " row " << row;
        }
      }
    }
  }
}

TEST(GemmCpu, ThreadsDoNotChangeTheResult) {
  for (CpuIsa isa : available_isas()) {
    for (int64_t m : {1, 6, 140}) {
      Case c({m, 150, 640, 128, 4, DType::kFloat16, true});
      c.randomize(2);
      const Array expected = c.run_isa(isa);
      for (int threads : {2, 5, 64}) EXPECT_EQ(c.run_isa(isa, test::threaded_for(threads)).bytes, expected.bytes);
    }
  }
}

TEST(GemmCpu, RowsOfTilesMayBeApart) {
  for (CpuIsa isa : available_isas()) {
    for (int64_t m : {1, 4}) {
      Case c({m, 130, 256, 128, 4, DType::kBFloat16, true});
      c.randomize(8);
      EXPECT_EQ(c.run_isa(isa, test::serial_for, tile_words(4)).bytes, c.run_isa(isa).bytes);
    }
  }
}

// Whether the code at (row, col) is zero and stored all the same, to fill its quad: zero times infinity is then in the
// sum.
bool keeps_zero(const Case& c, int64_t row, int64_t col) {
  const int64_t quad = col / kQuad * kQuad;
  unsigned mask = 0;
  for (int i = 0; i < kQuad; ++i)
    mask |= static_cast<unsigned>(c.codes[static_cast<size_t>(row * c.problem.k + quad + i)] != 0) << i;
  const Pattern kept = canonical_pattern(mask);
  return (mask >> (col - quad) & 1) == 0 && (kept.first == col - quad || kept.second == col - quad);
}

// What is not a number in one token stays there, and an infinity meets no padding.
TEST(GemmCpu, NonFiniteActivationsStayInTheirToken) {
  const float inf = std::numeric_limits<float>::infinity();
  for (CpuIsa isa : available_isas()) {
    Case c({9, 24, 132, 128, 4, DType::kFloat16, false});
    c.randomize(4);
    const Array clean = c.run_isa(isa);
    c.acts.set(3 * 132 + 131, std::numeric_limits<float>::quiet_NaN());
    c.acts.set(5 * 132 + 64, inf);
    const Array out = c.run_isa(isa);
    for (int64_t token = 0; token < 9; ++token) {
      for (int64_t row = 0; row < 24; ++row) {
        const float value = out[token * 24 + row];
        if (token == 3) {
          EXPECT_EQ(std::isnan(value), c.weight(row, 131) != 0 || keeps_zero(c, row, 131)) << row;
        } else if (token == 5 && c.weight(row, 64) != 0) {
          EXPECT_EQ(value, std::copysign(inf, static_cast<float>(c.weight(row, 64)))) << row;
        } else if (token != 5) {
          EXPECT_EQ(value, clean[token * 24 + row]) << token << " " << row;
        }
      }
    }
    Case one({1, 24, 132, 128, 4, DType::kFloat32, false});
    one.codes = c.codes;
    for (int64_t i = 0; i < 132; ++i) one.acts.set(i, i == 131 ? inf : 1.0f);
    const Array single = one.run_isa(isa);
    for (int64_t row = 0; row < 24; ++row) {
      if (one.weight(row, 131) != 0) {
        EXPECT_EQ(single[row], std::copysign(inf, static_cast<float>(one.weight(row, 131)))) << row;
      } else if (!keeps_zero(one, row, 131)) {
        EXPECT_TRUE(std::isfinite(single[row])) << row;
      }
    }
  }
}

// Large activations: the sum of codes before scaling must not overflow where the scaled sum does not.
TEST(GemmCpu, LargeActivationsStayFinite) {
  for (CpuIsa isa : available_isas()) {
    for (int64_t m : {1, 3}) {
      Case c({m, 16, 128, 128, 8, DType::kBFloat16, false});
      c.randomize(6);
      for (int64_t i = 0; i < m * 128; ++i) c.acts.set(i, c.acts[i] * 1e30f);
      expect_matches_codes(c, c.run_isa(isa), name(c.problem, isa));
    }
  }
}

}  // namespace
}  // namespace sparse_marlin
