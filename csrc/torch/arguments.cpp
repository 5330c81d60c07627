// The argument checks of the operators, in the order in which a caller wants to hear of them.
#include "torch/arguments.h"

#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <vector>

#include "legacy/marlin_24.h"
#include "plan/low_rank.h"

namespace sparse_marlin {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, IntHeaderOnlyArrayRef(shape.data(), shape.size()), type);
}

std::string sizes_text(int64_t n, int64_t k, int64_t num_bits) {
  return "N=" + std::to_string(n) + ", K=" + std::to_string(k) + ", num_bits=" + std::to_string(num_bits);
}

void expect_acts(const Arg& a) {
  if (a.tensor.dim() < 1) fail(a.op, a.name, "at least 1 dimension [..., K]", "a scalar");
  if (a.tensor.is_cuda()) {
    const bool fp32 = a.tensor.scalar_type() == ScalarType::Float;
    expect_dtype(
        a, {ScalarType::Half, ScalarType::BFloat16},
        fp32 ? "float32 runs on the CPU only: convert the activations and the scales with .half() or .bfloat16()" : "");
  } else {
    expect_dtype(a, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  }
}

// Says of the two tensors which one is wrong: a packed tensor of a whole number of tiles is taken at its word about K.
void expect_weight_shape(const Arg& weight, int64_t n, int64_t k, int64_t num_bits) {
  const int bits = static_cast<int>(num_bits);
  const int64_t words = weight.tensor.size(1), tile = format::tile_words(bits);
  if (words != format::packed_row_words(k, bits) && words > 0 && words % tile == 0) {
    const int64_t cols = words / tile * format::kTileCols;
    fail(weight.op, "a",
         "a last dimension (K) of " + std::to_string(cols - format::kTileCols + kColMultiple) + ".." +
             std::to_string(cols) + ", which is what weight_packed " + shape_text(weight.tensor) +
             " holds for num_bits=" + std::to_string(num_bits),
         std::to_string(k));
  }
  expect_shape(weight, {format::row_tiles(n), format::packed_row_words(k, bits)},
               [=] { return "for " + sizes_text(n, k, num_bits) + " (what pack_24_weights returned)"; });
}

void expect_scales_shape(const Arg& scales, int64_t n, int64_t k, int64_t group_size) {
  expect_shape(scales, {num_groups(k, group_size), n}, [=] {
    return "(groups, N) for N=" + std::to_string(n) + ", K=" + std::to_string(k) +
           ", group_size=" + std::to_string(group_size);
  });
}

WeightType weight_type(ScalarType type) {
  switch (type) {
    case ScalarType::Char: return WeightType::kCodes;
    case ScalarType::Float: return WeightType::kFloat32;
    case ScalarType::Half: return WeightType::kFloat16;
    default: return WeightType::kBFloat16;
  }
}

void expect_no_fault(const char* op, const PackStatus& status, int num_bits, const char* weight_name) {
  if (status.ok()) return;
  const char* name = status.fault == PackFault::kScale ? "scales" : weight_name;
  throw std::runtime_error(std::string(op) + ": " + name + ": " + describe(status, num_bits));
}

}  // namespace

GemmCall gemm_call(const Tensor& a, const Tensor& weight_packed, const Tensor& scales, int64_t group_size,
                   int64_t num_bits, const std::optional<Tensor>& bias, const char* op) {
  const Arg acts{op, "a", a}, weight{op, "weight_packed", weight_packed}, scale{op, "scales", scales};
  expect_num_bits(op, num_bits);
  expect_group_size(op, group_size);
  for (const Arg* arg : {&acts, &weight, &scale}) expect_tensor(*arg);
  expect_acts(acts);
  expect_device_of(weight, acts);
  expect_dtype(weight, {ScalarType::Int});
  expect_dims(weight, 2, "(as pack_24_weights returns it)");
  expect_device_of(scale, acts);
  expect_dtype_of(scale, acts);
  expect_dims(scale, 2, "[groups, N]");

  const auto shape = a.sizes();
  const int64_t k = a.size(a.dim() - 1), n = scales.size(1);
  expect_in_features(op, "a", k);
  expect_out_features(op, "scales", n);
  expect_weight_shape(weight, n, k, num_bits);
  expect_scales_shape(scale, n, k, group_size);
  if (bias) {
    const Arg offset{op, "bias", *bias};
    expect_device_of(offset, acts);
    expect_dtype_of(offset, acts);
    expect_shape(offset, {n}, [] { return "(one value an out feature)"; });
  }
  const int64_t m = a.numel() / k;
  if (m > kMaxTokens) fail(op, "a", "at most " + std::to_string(kMaxTokens) + " tokens (M)", std::to_string(m));

  std::vector<int64_t> out_shape(shape.begin(), shape.end());
  out_shape.back() = n;
  GemmCall call{};
  call.problem = {
      m, n, k, static_cast<int>(group_size), static_cast<int>(num_bits), core_dtype(a.scalar_type()), bias.has_value()};
  call.out = new_tensor(a, out_shape, a.scalar_type());
  call.acts = dense_aligned(a);
  call.weights = packed_rows(weight_packed);
  call.scales = dense_aligned(scales);
  if (bias) call.bias = dense_aligned(*bias);
  call.params = {call.acts.const_data_ptr(),
                 call.weights.words,
                 call.weights.row_words,
                 call.scales.const_data_ptr(),
                 bias ? call.bias->const_data_ptr() : nullptr,
                 call.out.mutable_data_ptr(),
                 nullptr};
  return call;
}

namespace {

void expect_packed_up(LowRankCall& call, const Arg& up, const std::optional<Tensor>& up_scales, int64_t rank) {
  const Problem& problem = call.gemm.problem;
  const int64_t k = tail_tiles(rank) * int64_t{format::kTileCols};
  if (problem.group_size == kChannelwise) {
    fail(kLowRankOp, "up", "a floating type [N, rank] for group_size -1", "int32, which is packed",
         "a packed factor needs groups; pass it dense");
  }
  expect_dims(up, 2, "(packed_24 of 128 columns for every 64 ranks)");
  expect_shape(up, {format::row_tiles(problem.n), format::packed_row_words(k, problem.num_bits)}, [&] {
    return "(packed_24) for " + sizes_text(problem.n, k, problem.num_bits) + ", since the rank is " +
           std::to_string(rank);
  });
  if (!up_scales) fail(kLowRankOp, "up_scales", "the scales of a packed up", "None");
  const Arg scales{kLowRankOp, "up_scales", *up_scales};
  expect_tensor(scales);
  expect_device_of(scales, {kLowRankOp, "a", call.gemm.acts});
  expect_dtype_of(scales, {kLowRankOp, "a", call.gemm.acts});
  expect_dims(scales, 2, "[groups, N]");
  expect_scales_shape(scales, problem.n, k, problem.group_size);
  call.up_weights = packed_rows(up.tensor);
  call.up_scales = dense_aligned(*up_scales);
}

}  // namespace

LowRankCall low_rank_call(const Tensor& a, const Tensor& weight_packed, const Tensor& scales, const Tensor& down,
                          const Tensor& up, int64_t group_size, int64_t num_bits, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& up_scales) {
  const Arg acts{kLowRankOp, "a", a}, first{kLowRankOp, "down", down}, second{kLowRankOp, "up", up};
  LowRankCall call{gemm_call(a, weight_packed, scales, group_size, num_bits, bias, kLowRankOp), down, up, {}, {}};
  for (const Arg* arg : {&first, &second}) {
    expect_tensor(*arg);
    expect_device_of(*arg, acts);
  }
  expect_dtype_of(first, acts);
  const int64_t n = call.gemm.problem.n, k = call.gemm.problem.k;
  expect_dims(first, 2, "[rank, K]");
  const int64_t rank = down.size(0);
  expect_shape(first, {rank, k}, [=] { return "(rank, K) for K=" + std::to_string(k); });
  if (rank < 1) fail(kLowRankOp, "down", "a rank (first dimension) of at least 1", std::to_string(rank));
  call.down = dense_aligned(down);
  if (up.scalar_type() == ScalarType::Int) {
    expect_packed_up(call, second, up_scales, rank);
    return call;
  }
  expect_dtype_of(second, acts);
  if (up_scales) fail(kLowRankOp, "up_scales", "None, since up is dense", shape_text(*up_scales));
  expect_shape(second, {n, rank}, [=] {
    return "(N, rank) for N=" + std::to_string(n) + " and the rank of down, " + std::to_string(rank);
  });
  call.up = dense_aligned(up);
  return call;
}

void expect_next(const Tensor& next_packed, const Tensor& a, const char* op) {
  const Arg next{op, "next_packed", next_packed};
  expect_tensor(next);
  expect_device_of(next, {op, "a", a});
  expect_dtype(next, {ScalarType::Int});
  expect_dims(next, 2, "(as pack_24_weights returns it)");
}

PackCall pack_call(const Tensor& weight, const Tensor& scales, int64_t group_size, int64_t num_bits) {
  const Arg dense{kPackOp, "weight", weight}, scale{kPackOp, "scales", scales};
  expect_num_bits(kPackOp, num_bits);
  expect_group_size(kPackOp, group_size);
  for (const Arg* arg : {&dense, &scale}) expect_tensor(*arg);
  expect_dtype(dense, {ScalarType::Char, ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  expect_dims(dense, 2, "[N, K]");
  expect_device_of(scale, dense);
  expect_dtype(scale, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  expect_dims(scale, 2, "[groups, N]");
  const int64_t n = weight.size(0), k = weight.size(1);
  expect_out_features(kPackOp, "weight", n);
  expect_in_features(kPackOp, "weight", k);
  expect_scales_shape(scale, n, k, group_size);

  const int bits = static_cast<int>(num_bits);
  PackCall call{};
  call.weight = dense_aligned(weight);
  call.scales = dense_aligned(scales);
  call.packed = new_tensor(weight, {format::row_tiles(n), format::packed_row_words(k, bits)}, ScalarType::Int);
  call.params = {call.weight.const_data_ptr(),
                 weight_type(weight.scalar_type()),
                 call.scales.const_data_ptr(),
                 core_dtype(scales.scalar_type()),
                 n,
                 k,
                 static_cast<int>(group_size),
                 bits,
                 static_cast<uint32_t*>(call.packed.mutable_data_ptr())};
  return call;
}

UnpackCall unpack_call(const Tensor& weight_packed, int64_t size_n, int64_t size_k, int64_t num_bits) {
  const Arg packed{kUnpackOp, "weight_packed", weight_packed};
  expect_num_bits(kUnpackOp, num_bits);
  expect_dtype(packed, {ScalarType::Int});
  expect_dims(packed, 2, "(as pack_24_weights returns it)");
  expect_out_features(kUnpackOp, "size_n", size_n);
  expect_in_features(kUnpackOp, "size_k", size_k);
  const int bits = static_cast<int>(num_bits);
  expect_shape(packed, {format::row_tiles(size_n), format::packed_row_words(size_k, bits)},
               [=] { return "for " + sizes_text(size_n, size_k, num_bits) + " (what pack_24_weights returned)"; });

  UnpackCall call{};
  call.packed = packed_rows(weight_packed);
  call.codes = new_tensor(weight_packed, {size_n, size_k}, ScalarType::Char);
  call.params = {call.packed.words,
                 call.packed.row_words,
                 size_n,
                 size_k,
                 bits,
                 static_cast<int8_t*>(call.codes.mutable_data_ptr())};
  return call;
}

ImportCall import_call(const Tensor& packed, const Tensor& meta, int64_t num_bits) {
  const Arg codes{kImportOp, "packed", packed}, indices{kImportOp, "meta", meta};
  expect_num_bits(kImportOp, num_bits);
  for (const Arg* arg : {&codes, &indices}) expect_tensor(*arg);
  expect_dtype(codes, {ScalarType::Int});
  expect_dims(codes, 2, "[K / 32, N * num_bits / 2]");
  expect_device_of(indices, codes);
  expect_dtype(indices, {ScalarType::Short});
  expect_dims(indices, 2, "[K / 32, N * 2]");
  const int bits = static_cast<int>(num_bits);
  const int64_t steps = packed.size(0), n = meta.size(1) / legacy::kStepBlocks, k = steps * format::kStepCols;
  if (meta.size(0) != steps || meta.size(1) != legacy::row_meta(n) || !legacy::valid_shape(n, k)) {
    fail(kImportOp, "meta",
         "[" + std::to_string(steps) + ", N * 2], as many rows as packed and N a positive multiple of " +
             std::to_string(legacy::kRunRows),
         shape_text(meta));
  }
  expect_shape(codes, {steps, legacy::row_words(n, bits)}, [=] { return "for " + sizes_text(n, k, num_bits); });
  expect_out_features(kImportOp, "meta", n);
  expect_in_features(kImportOp, "packed", k);

  ImportCall call{};
  call.codes = dense_aligned(packed);
  call.meta = dense_aligned(meta);
  call.packed = new_tensor(packed, {format::row_tiles(n), format::packed_row_words(k, bits)}, ScalarType::Int);
  call.params = {static_cast<const uint32_t*>(call.codes.const_data_ptr()),
                 static_cast<const uint16_t*>(call.meta.const_data_ptr()),
                 n,
                 k,
                 bits,
                 static_cast<uint32_t*>(call.packed.mutable_data_ptr())};
  return call;
}

ExportCall export_call(const Tensor& weight_packed, int64_t size_n, int64_t size_k, int64_t num_bits) {
  const Arg packed{kExportOp, "weight_packed", weight_packed};
  expect_num_bits(kExportOp, num_bits);
  expect_dtype(packed, {ScalarType::Int});
  expect_dims(packed, 2, "(as pack_24_weights returns it)");
  expect_out_features(kExportOp, "size_n", size_n);
  expect_in_features(kExportOp, "size_k", size_k);
  if (size_n % legacy::kRunRows != 0) {
    fail(kExportOp, "size_n", "a multiple of " + std::to_string(legacy::kRunRows) + ", which marlin-24 is limited to",
         std::to_string(size_n));
  }
  if (size_k % format::kStepCols != 0) {
    fail(kExportOp, "size_k", "a multiple of " + std::to_string(format::kStepCols) + ", which marlin-24 is limited to",
         std::to_string(size_k));
  }
  const int bits = static_cast<int>(num_bits);
  expect_shape(packed, {format::row_tiles(size_n), format::packed_row_words(size_k, bits)},
               [=] { return "for " + sizes_text(size_n, size_k, num_bits) + " (what pack_24_weights returned)"; });

  const int64_t steps = size_k / format::kStepCols;
  ExportCall call{};
  call.packed = packed_rows(weight_packed);
  call.codes = new_tensor(weight_packed, {steps, legacy::row_words(size_n, bits)}, ScalarType::Int);
  call.meta = new_tensor(weight_packed, {steps, legacy::row_meta(size_n)}, ScalarType::Short);
  call.params = {call.packed.words,
                 call.packed.row_words,
                 size_n,
                 size_k,
                 bits,
                 static_cast<uint32_t*>(call.codes.mutable_data_ptr()),
                 static_cast<uint16_t*>(call.meta.mutable_data_ptr())};
  return call;
}

void expect_packed(const PackStatus& status, int num_bits) { expect_no_fault(kPackOp, status, num_bits, "weight"); }
void expect_unpacked(const PackStatus& status, int num_bits) {
  expect_no_fault(kUnpackOp, status, num_bits, "weight_packed");
}
void expect_imported(const PackStatus& status, int num_bits) { expect_no_fault(kImportOp, status, num_bits, "meta"); }
void expect_exported(const PackStatus& status, int num_bits) {
  expect_no_fault(kExportOp, status, num_bits, "weight_packed");
}

}  // namespace sparse_marlin
