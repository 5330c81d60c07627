// From an operator's tensors to the plain structs of the core: every argument checked, every pointer ready for a
// kernel.
#pragma once
#include <optional>

#include "device/params.h"
#include "legacy/convert.h"
#include "pack/pack_24.h"
#include "torch/checks.h"

namespace sparse_marlin {

inline constexpr char kPackOp[] = "pack_24_weights";
inline constexpr char kUnpackOp[] = "unpack_24_weights";
inline constexpr char kGemmOp[] = "sparse_marlin_gemm";
inline constexpr char kLowRankOp[] = "sparse_marlin_gemm_low_rank";
inline constexpr char kPrefetchOp[] = "sparse_marlin_gemm_prefetch";
inline constexpr char kImportOp[] = "import_marlin_24";
inline constexpr char kExportOp[] = "export_marlin_24";

// Each holds the tensors its pointers point into.
struct GemmCall {
  Problem problem;
  GemmParams params;
  Tensor out;
  Tensor acts;
  PackedRows weights;
  Tensor scales;
  std::optional<Tensor> bias;
};
struct LowRankCall {
  GemmCall gemm;
  Tensor down;
  Tensor up;
  // Of a packed `up` (plan/low_rank.h).
  std::optional<PackedRows> up_weights;
  std::optional<Tensor> up_scales;
  bool packed() const { return up_weights.has_value(); }
};
struct PackCall {
  PackParams params;
  Tensor packed;
  Tensor weight;
  Tensor scales;
};
struct UnpackCall {
  UnpackParams params;
  Tensor codes;
  PackedRows packed;
};

struct ImportCall {
  ImportParams params;
  Tensor packed;
  Tensor codes;
  Tensor meta;
};
struct ExportCall {
  ExportParams params;
  Tensor codes;
  Tensor meta;
  PackedRows packed;
};

// Shapes as in the operators' schemas. The outputs are allocated on the device of the first tensor.
GemmCall gemm_call(const Tensor& a, const Tensor& weight_packed, const Tensor& scales, int64_t group_size,
                   int64_t num_bits, const std::optional<Tensor>& bias, const char* op = kGemmOp);
LowRankCall low_rank_call(const Tensor& a, const Tensor& weight_packed, const Tensor& scales, const Tensor& down,
                          const Tensor& up, int64_t group_size, int64_t num_bits, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& up_scales);
// Throws where `next_packed` cannot be what the multiplication after that of `a` reads.
void expect_next(const Tensor& next_packed, const Tensor& a, const char* op = kPrefetchOp);
PackCall pack_call(const Tensor& weight, const Tensor& scales, int64_t group_size, int64_t num_bits);
UnpackCall unpack_call(const Tensor& weight_packed, int64_t size_n, int64_t size_k, int64_t num_bits);
ImportCall import_call(const Tensor& packed, const Tensor& meta, int64_t num_bits);
ExportCall export_call(const Tensor& weight_packed, int64_t size_n, int64_t size_k, int64_t num_bits);

// Throws the message of a fault, if there is one.
void expect_packed(const PackStatus& status, int num_bits);
void expect_unpacked(const PackStatus& status, int num_bits);
void expect_imported(const PackStatus& status, int num_bits);
void expect_exported(const PackStatus& status, int num_bits);

}  // namespace sparse_marlin
