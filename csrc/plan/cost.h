// What a plan costs: what it makes the GPU do, and the microseconds that takes by constants fitted to measurements. Pure.
#pragma once
#include "plan/plan.h"
#include "plan/tiles_all.h"

namespace sparse_marlin {

// What a plan makes the GPU do. Blocks run in waves: as many at once as the SMs hold. Stream-K has two phases: whole output tiles, if
// there are rounds of them, then a range of column tiles for every block.
struct Effort {
  double turns =
      0;  // 128-column tiles that a block does one after another (each of its teams or warps along k does one)
  double full_waves = 0;   // waves in which an SM holds as many blocks as it can,
  double resident = 1;     // namely so many
  double last_wave = 0;    // blocks an SM holds in the wave after these; 0: there is none
  double tiles = 0;        // output tiles or parts of one that an SM's blocks do
  double dram_us = 0;      // bytes over bandwidth: each input and output once
  double l2_us = 0;        // bytes over a nominal bandwidth: what the blocks of one SM read
  double range_turns = 0;  // of the ranges
  double range_tiles = 0;
  double range_dram_us = 0;  // with what is read again
  double range_l2_us = 0;
  double crowding = 0;   // 0: the next kernel's blocks all find room beside this one's, 1: none does
  double behind = 0;     // 1: of a correction, the blocks that project come behind those that multiply
  double late = 0;       // 1: of a correction, some of the blocks that multiply wait for places
  double exchanges = 0;  // of sums, one after another: a cluster that splits k ends with its output tile
  double streams = 0;    // 1: stream-K, and
  double parts = 0;      // blocks that a tile's sums come from
  double reduce_us = 0;  // the portable kernel's splits: their sums, through the workspace
};

Effort effort(const Problem& problem, const Device& device, const Plan& plan);
double predicted_us(const Problem& problem, const Device& device, const Plan& plan);

}  // namespace sparse_marlin
