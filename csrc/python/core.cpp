// sparse_marlin._core: the torch-free core for Python and for tests. The packed format's constants and shapes, the
// planner and its explanation, the tile table, and what this build contains. Operators never go through it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>

#include "format/packed_24.h"
#include "format/problem.h"
#include "legacy/marlin_24.h"
#include "plan/cost.h"
#include "plan/low_rank.h"
#include "plan/plan.h"
#include "plan/tiles.h"
#include "plan/tiles_all.h"

namespace py = pybind11;
using namespace sparse_marlin;

// setup.py passes both as bare words: "sm_80,compute_80,sm_90a" and "13.0", or nothing.
#define SPARSE_MARLIN_TEXT_OF(...) #__VA_ARGS__
#define SPARSE_MARLIN_TEXT(...) SPARSE_MARLIN_TEXT_OF(__VA_ARGS__)

namespace {

void expect(bool ok, const std::string& function, const std::string& argument, const std::string& expected,
            int64_t got) {
  if (!ok)
    throw py::value_error(function + ": " + argument + ": expected " + expected + ", got " + std::to_string(got));
}

std::pair<int64_t, int64_t> packed_shape(int64_t n, int64_t k, int num_bits) {
  expect(format::valid_bits(num_bits), "packed_shape", "num_bits", "4 or 8", num_bits);
  expect(n >= 1 && n <= kMaxFeatures, "packed_shape", "n", "1.." + std::to_string(kMaxFeatures), n);
  expect(k >= 1 && k <= kMaxFeatures && k % kColMultiple == 0, "packed_shape", "k",
         "a multiple of " + std::to_string(kColMultiple) + " in 1.." + std::to_string(kMaxFeatures), k);
  return {format::row_tiles(n), format::packed_row_words(k, num_bits)};
}

std::pair<int64_t, int64_t> scales_shape(int64_t n, int64_t k, int64_t group_size) {
  expect(valid_group_size(group_size), "scales_shape", "group_size", "one of sparse_marlin._core.GROUP_SIZES",
         group_size);
  return {num_groups(k, group_size), n};
}

int dtype_index(const std::string& name) {
  for (const DType type : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (name == dtype_name(type)) return static_cast<int>(type);
  }
  throw py::value_error("Problem: dtype: expected float32, float16 or bfloat16, got " + name);
}

// A tile of any kernel, as Python sees it.
struct AnyTile {
  std::string kernel;
  int block_m;
  int block_n;
  int share;
  int teams;
  int threads;
  int blocks;
};

std::vector<AnyTile> all_tiles() {
  std::vector<AnyTile> all;
  for (int i = 0; i < kNumTiles; ++i)
    all.push_back({family_name(family(i)), block_m(i), block_n(i), share(i), teams(i), threads(i), blocks(i)});
  return all;
}

std::string text(const Plan& p) {
  std::ostringstream out;
  out << "Plan(tile=" << p.tile << ", splits=" << p.splits << ", num_stages=" << p.num_stages << ", grid=" << p.grid
      << ", threads=" << p.threads << ", smem_bytes=" << p.smem_bytes << ", workspace_bytes=" << p.workspace_bytes
      << ", predicted_us=" << p.predicted_us << ")";
  return out.str();
}

void bind_format(py::module_& m) {
  m.attr("FORMAT_NAME") = format::kName;
  m.attr("FORMAT_VERSION") = format::kVersion;
  m.attr("TILE_ROWS") = format::kTileRows;
  m.attr("TILE_COLS") = format::kTileCols;
  m.attr("COL_MULTIPLE") = kColMultiple;
  m.attr("QUAD") = format::kQuad;
  m.attr("KEPT_PER_QUAD") = format::kKeptPerQuad;
  m.attr("MARLIN_24_ROWS") = legacy::kRunRows;  // the old format: features of a run, columns of a step
  m.attr("MARLIN_24_COLS") = format::kStepCols;
  m.attr("MAX_TOKENS") = kMaxTokens;
  m.attr("MAX_RANK") = kMaxRank;  // of a low-rank correction in the same launch, which is a multiple of the next
  m.attr("RANK_MULTIPLE") = kProjectRanks;
  m.attr("TAIL_RANKS") = kTailRanks;  // of a correction's packed second factor: ranks for each 128 columns
  m.attr("MAX_FEATURES") = kMaxFeatures;
  m.attr("CHANNELWISE") = kChannelwise;
  m.attr("GROUP_SIZES") = py::tuple(py::cast(kGroupSizes));
  m.attr("NUM_BITS") = py::make_tuple(4, 8);
  m.def("code_min", &format::code_min, py::arg("num_bits"));
  m.def("code_max", &format::code_max, py::arg("num_bits"));
  m.def("tile_words", &format::tile_words, py::arg("num_bits"),
        "32-bit words of one tile: the step of a slice along K");
  m.def("slice_words", &format::slice_words, py::arg("num_bits"));
  m.def("slice_code_words", &format::slice_code_words, py::arg("num_bits"));
  m.def("num_groups", &num_groups, py::arg("k"), py::arg("group_size"));
  m.def("packed_shape", &packed_shape, py::arg("n"), py::arg("k"), py::arg("num_bits"),
        "Shape of the packed int32 tensor.");
  m.def("scales_shape", &scales_shape, py::arg("n"), py::arg("k"), py::arg("group_size"),
        "Shape [groups, N] of the scales.");
  m.def(
      "code_location",
      [](int row, int kept, int num_bits) {
        const auto at = format::code_location(row, kept, num_bits);
        return std::pair(at.word, at.shift);
      },
      py::arg("row"), py::arg("kept"), py::arg("num_bits"), "(word, shift) of a code inside a slice.");
  m.def(
      "meta_location",
      [](int row, int quad, int num_bits) {
        const auto at = format::meta_location(row, quad, num_bits);
        return std::pair(at.word, at.shift);
      },
      py::arg("row"), py::arg("quad"), py::arg("num_bits"),
      "(word, shift) of a quad's metadata nibble inside a slice.");
  m.def("slice_offset_words", &format::slice_offset_words, py::arg("n"), py::arg("k"), py::arg("num_bits"));
}

void bind_structs(py::module_& m) {
  py::class_<Problem>(m, "Problem", "out[m, n] = a[m, k] @ weight[n, k].T (+ bias[n])")
      .def(py::init([](int64_t mm, int64_t n, int64_t k, int group_size, int num_bits, const std::string& dtype,
                       bool has_bias) {
             expect(valid_group_size(group_size), "Problem", "group_size", "one of sparse_marlin._core.GROUP_SIZES",
                    group_size);
             expect(format::valid_bits(num_bits), "Problem", "num_bits", "4 or 8", num_bits);
             return Problem{mm, n, k, group_size, num_bits, static_cast<DType>(dtype_index(dtype)), has_bias};
           }),
           py::arg("m"), py::arg("n"), py::arg("k"), py::arg("group_size") = 128, py::arg("num_bits") = 4,
           py::arg("dtype") = "float16", py::arg("has_bias") = false)
      .def_readonly("m", &Problem::m)
      .def_readonly("n", &Problem::n)
      .def_readonly("k", &Problem::k)
      .def_readonly("group_size", &Problem::group_size)
      .def_readonly("num_bits", &Problem::num_bits)
      .def_property_readonly("dtype", [](const Problem& p) { return dtype_name(p.dtype); })
      .def_readonly("has_bias", &Problem::has_bias);
  py::class_<Device>(m, "Device",
                     "A GPU, as far as planning needs to know it; compute_capability is 10 * major + minor.")
      .def(py::init<int, int, int, int, int64_t, double, bool>(), py::arg("compute_capability"), py::arg("num_sms"),
           py::arg("smem_per_block"), py::arg("smem_per_sm"), py::arg("l2_bytes"), py::arg("dram_gb_per_s") = 0.0,
           py::arg("hopper_kernels") = true)
      .def_readonly("compute_capability", &Device::compute_capability)
      .def_readonly("num_sms", &Device::num_sms)
      .def_readonly("smem_per_block", &Device::smem_per_block)
      .def_readonly("smem_per_sm", &Device::smem_per_sm)
      .def_readonly("l2_bytes", &Device::l2_bytes)
      .def_readonly("dram_gb_per_s", &Device::dram_gb_per_s)
      .def_readonly("hopper_kernels", &Device::hopper_kernels);
  py::class_<Effort>(m, "Effort", "What a plan makes the GPU do, in the terms of the cost model (csrc/plan/cost.h).")
      .def_readonly("turns", &Effort::turns)
      .def_readonly("full_waves", &Effort::full_waves)
      .def_readonly("resident", &Effort::resident)
      .def_readonly("last_wave", &Effort::last_wave)
      .def_readonly("tiles", &Effort::tiles)
      .def_readonly("dram_us", &Effort::dram_us)
      .def_readonly("l2_us", &Effort::l2_us)
      .def_readonly("range_turns", &Effort::range_turns)
      .def_readonly("range_tiles", &Effort::range_tiles)
      .def_readonly("range_dram_us", &Effort::range_dram_us)
      .def_readonly("range_l2_us", &Effort::range_l2_us)
      .def_readonly("crowding", &Effort::crowding)
      .def_readonly("behind", &Effort::behind)
      .def_readonly("late", &Effort::late)
      .def_readonly("exchanges", &Effort::exchanges)
      .def_readonly("streams", &Effort::streams)
      .def_readonly("parts", &Effort::parts)
      .def_readonly("reduce_us", &Effort::reduce_us);
  py::class_<Plan>(m, "Plan")
      .def_readonly("tile", &Plan::tile)
      .def_readonly("splits", &Plan::splits)
      .def_readonly("num_stages", &Plan::num_stages)
      .def_readonly("grid", &Plan::grid)
      .def_readonly("rank", &Plan::rank)
      .def_readonly("tail", &Plan::tail)
      .def_readonly("project_blocks", &Plan::project_blocks)
      .def_readonly("shares", &Plan::shares)
      .def_readonly("behind", &Plan::behind)
      .def_readonly("threads", &Plan::threads)
      .def_readonly("smem_bytes", &Plan::smem_bytes)
      .def_readonly("spread", &Plan::spread)
      .def_readonly("workspace_bytes", &Plan::workspace_bytes)
      .def_readonly("predicted_us", &Plan::predicted_us)
      .def("__repr__", &text);
  py::class_<AnyTile>(m, "Tile",
                      "block_m tokens x block_n features; share: blocks along features that share activations; teams: "
                      "of warpgroups, that share out k; blocks: that an SM may hold at once.")
      .def_readonly("kernel", &AnyTile::kernel)
      .def_readonly("block_m", &AnyTile::block_m)
      .def_readonly("block_n", &AnyTile::block_n)
      .def_readonly("share", &AnyTile::share)
      .def_readonly("teams", &AnyTile::teams)
      .def_readonly("threads", &AnyTile::threads)
      .def_readonly("blocks", &AnyTile::blocks);
}

void bind_planner(py::module_& m) {
  m.attr("TILES") = py::tuple(py::cast(all_tiles()));
  m.def("plan", &plan, py::arg("problem"), py::arg("device"), "The best plan; ValueError says why there is none.");
  m.def("effort", &effort, py::arg("problem"), py::arg("device"), py::arg("plan"));
  m.def("plan_with_tile", &plan_with_tile, py::arg("problem"), py::arg("device"), py::arg("tile"),
        py::arg("splits") = 0);
  m.def("may_share", &may_share, py::arg("problem"), py::arg("device"), py::arg("tile"),
        "Whether the planner considers the tile, of which blocks may share activations.");
  m.def("plan_low_rank", &plan_low_rank, py::arg("problem"), py::arg("device"), py::arg("rank"),
        py::arg("packed") = false,
        "The best plan with a low-rank correction in the same launch; where there is none, plan()'s, of rank 0.");
  m.def("plan_low_rank_with_tile", &plan_low_rank_with_tile, py::arg("problem"), py::arg("device"), py::arg("rank"),
        py::arg("tile"), py::arg("splits") = 0, py::arg("packed") = false);
  m.def("explain", &explain, py::arg("problem"), py::arg("device"),
        "Every candidate, with its predicted time or why it was rejected.");
  m.def("why_unsupported", &why_unsupported, py::arg("problem"), py::arg("device"),
        "Why it cannot run there, or an empty string.");
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The torch-free core of sparse_marlin: packed format, planner, build description.";
  bind_format(m);
  bind_structs(m);
  bind_planner(m);
  m.attr("BUILT_ARCHITECTURES") = SPARSE_MARLIN_TEXT(SPARSE_MARLIN_ARCHITECTURES);
  m.attr("BUILT_CUDA_VERSION") = SPARSE_MARLIN_TEXT(SPARSE_MARLIN_CUDA_VERSION);
}
