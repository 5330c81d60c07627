// The low-rank correction as two dense products of torch's: for the CPU, for many tokens, and wherever there is no kernel for it.
#pragma once
#include "torch/arguments.h"

namespace sparse_marlin {

// out += (a @ down^T) @ up^T, behind the multiplication that has written `out`. M must not be 0.
void add_products(const LowRankCall& call);

}  // namespace sparse_marlin
