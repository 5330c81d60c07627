// Which part of the output a block computes. Pure index arithmetic.
#pragma once
#include <cstdint>

#include "format/packed_24.h"

namespace sparse_marlin::device {

struct BlockWork {
  int tile_m;  // index of the block_m x block_n output tile
  int tile_n;
  int split;      // which share of k
  int first_col;  // share of k, in 128-column tiles: [first_col, last_col)
  int last_col;
};

// Neighbouring blocks take the shares of one output tile, then up to kRaster token tiles over the same weights, then the next
// features: weights are read from DRAM once, and the activations of kRaster token tiles stay in L2 meanwhile.
inline constexpr int kRaster = 8;

SPARSE_MARLIN_HD inline BlockWork block_work(int block, int tiles_m, int tiles_n, int splits, int col_tiles) {
  BlockWork w{0, block, 0, 0, col_tiles};
  int tile = block;
  // A division takes a tenth of a microsecond of the start, when nothing has been asked for yet.
  if (splits > 1) {
    tile = block / splits;
    w.split = block - tile * splits;
    // shares differ by one tile at most
    w.first_col = col_tiles * w.split / splits;  // far from overflowing: 2^17 column tiles, 16 splits
    w.last_col = col_tiles * (w.split + 1) / splits;
    w.tile_n = tile;
  }
  if (tiles_m == 1) return w;
  const int panel = tile / (kRaster * tiles_n), in_panel = tile % (kRaster * tiles_n);
  const int left = tiles_m - panel * kRaster, rows = left < kRaster ? left : kRaster;
  w.tile_m = panel * kRaster + in_panel % rows;
  w.tile_n = in_panel / rows;
  return w;
}

// 2^32 / divisor, rounded up, by which a multiplication divides, exactly as long as dividend x divisor <= 2^32; 0 for 1.
SPARSE_MARLIN_HD constexpr uint32_t inverse(int divisor) {
  return divisor == 1 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) + divisor - 1) / divisor);
}

// floor(dividend / divisor) by that.
SPARSE_MARLIN_HD constexpr int divide(int dividend, uint32_t inverse) {
  return inverse == 0 ? dividend : static_cast<int>(uint64_t{static_cast<uint32_t>(dividend)} * inverse >> 32);
}

// For few tokens: the token tiles of the same features are neighbours, so that weights are read from memory once. All of k.
SPARSE_MARLIN_HD inline BlockWork work_of_neighbours(int tile, int tiles_m, uint32_t tiles_m_inverse, int col_tiles) {
  BlockWork w{0, tile, 0, 0, col_tiles};
  if (tiles_m == 1) return w;
  w.tile_n = static_cast<int>(uint64_t{static_cast<uint32_t>(tile)} * tiles_m_inverse >> 32);
  w.tile_m = tile - w.tile_n * tiles_m;
  return w;
}

// Divides what the host knows the divisor of: two multiplications, exact for all dividends below 2^32.
struct Divisor {
  uint64_t inverse = 0;  // 2^64 / divisor, rounded up; 0 for 1

  static constexpr Divisor by(uint32_t divisor) { return {divisor == 1 ? 0 : ~uint64_t{0} / divisor + 1}; }
  SPARSE_MARLIN_HD constexpr int divide(int dividend) const {
    const uint64_t n = static_cast<uint32_t>(dividend);
    if (inverse == 0) return dividend;
    const uint64_t low = n * (inverse & ~uint32_t{0});
    return static_cast<int>((n * (inverse >> 32) + (low >> 32)) >> 32);
  }
};

// The order of block_work where the split is known already, without its divisions: at the start of a launch they are a tenth of a
// microsecond each, and their code is fetched from memory.
struct TileOrder {
  int tiles_m;
  int tiles_n;
  int splits;
  int cols;  // column tiles of k
  uint32_t splits_inverse;
  uint32_t last_rows_inverse;  // of the token tiles of the last panel of kRaster
  Divisor panel;               // kRaster * tiles_n

  static constexpr TileOrder of(int tiles_m, int tiles_n, int splits, int cols) {
    return {tiles_m,
            tiles_n,
            splits,
            cols,
            device::inverse(splits),
            device::inverse((tiles_m - 1) % kRaster + 1),
            Divisor::by(static_cast<uint32_t>(kRaster * tiles_n))};
  }
  SPARSE_MARLIN_HD constexpr BlockWork work(int tile, int split) const {
    BlockWork w{0, tile, split, 0, cols};
    if (splits > 1) {
      w.first_col = divide(cols * split, splits_inverse);
      w.last_col = divide(cols * (split + 1), splits_inverse);
    }
    if (tiles_m == 1) return w;
    const int before = tiles_m > kRaster ? panel.divide(tile) * kRaster : 0;  // token tiles of the panels before
    const int in_panel = tile - before * tiles_n;
    const int left = tiles_m - before, rows = left < kRaster ? left : kRaster;
    w.tile_n = rows == kRaster ? in_panel / kRaster : divide(in_panel, last_rows_inverse);
    w.tile_m = before + in_panel - w.tile_n * rows;
    return w;
  }
};

}  // namespace sparse_marlin::device
