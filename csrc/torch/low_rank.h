// The low-rank correction as products: for the CPU, for many tokens of a dense second factor, and wherever there is no kernel for it.
#pragma once
#include <functional>

#include "torch/arguments.h"

namespace sparse_marlin {

// a @ down^T, [M, rank]. M must not be 0.
Tensor projected(const LowRankCall& call);

// out + projected(call) @ up^T, behind the multiplication that has written `out`, which may be what is returned. `multiply` runs a
// multiplication by a packed weight.
Tensor with_products(const LowRankCall& call, const std::function<Tensor(const GemmCall&)>& multiply);

}  // namespace sparse_marlin
