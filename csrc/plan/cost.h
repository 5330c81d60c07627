// Predicted time of a plan, in microseconds: a roofline of one wave with the costs that do not scale. Pure.
#pragma once
#include "plan/plan.h"
#include "plan/tiles_all.h"

namespace sparse_marlin {

double predicted_us(const Problem& problem, const Device& device, const Tile& tile, const Plan& plan);
double predicted_us(const Problem& problem, const Device& device, const TileSm90& tile, const Plan& plan);
double predicted_us(const Problem& problem, const Device& device, const TileDecode& tile, const Plan& plan);

}  // namespace sparse_marlin
