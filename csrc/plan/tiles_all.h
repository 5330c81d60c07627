// All tiles under one numbering, which plans and the operators use: portable, Hopper, decode.
#pragma once
#include "plan/tiles.h"
#include "plan/tiles_decode.h"
#include "plan/tiles_sm90.h"

namespace sparse_marlin {

enum class Family { kSm80, kSm90, kDecode };
constexpr const char* family_name(Family f) {
  return f == Family::kSm80 ? "sm80" : f == Family::kSm90 ? "sm90" : "decode";
}

inline constexpr int kFirstTileSm90 = static_cast<int>(kTiles.size());
inline constexpr int kFirstTileDecode = kFirstTileSm90 + static_cast<int>(kShapesSm90.size()) * kMaxShare;
inline constexpr int kNumTiles = kFirstTileDecode + static_cast<int>(kTilesDecode.size());

constexpr Family family(int tile) {
  return tile < kFirstTileSm90 ? Family::kSm80 : tile < kFirstTileDecode ? Family::kSm90 : Family::kDecode;
}
constexpr TileSm90 tile_sm90(int tile) {
  return {(tile - kFirstTileSm90) / kMaxShare, (tile - kFirstTileSm90) % kMaxShare + 1};
}
constexpr int tile_decode_index(int tile) { return tile - kFirstTileDecode; }
constexpr const TileDecode& tile_decode(int tile) { return kTilesDecode[tile_decode_index(tile)]; }

// Blocks along features that share activations.
constexpr int share(int tile) { return family(tile) == Family::kSm90 ? tile_sm90(tile).share : 1; }
// Of a block of the Hopper kernel, which take its column tiles in turn.
constexpr int teams(int tile) { return family(tile) == Family::kSm90 ? tile_sm90(tile).size().teams : 1; }
constexpr int block_m(int tile) {
  return family(tile) == Family::kSm80   ? kTiles[tile].block_m
         : family(tile) == Family::kSm90 ? tile_sm90(tile).size().block_m
                                         : tile_decode(tile).block_m;
}
// Features that one block computes, and that the blocks of a tile compute together.
constexpr int block_n(int tile) {
  return family(tile) == Family::kSm80   ? kTiles[tile].block_n
         : family(tile) == Family::kSm90 ? tile_sm90(tile).size().block_n()
                                         : tile_decode(tile).block_n();
}
constexpr int tile_n(int tile) { return block_n(tile) * share(tile); }
constexpr int threads(int tile) {
  return family(tile) == Family::kSm80   ? kTiles[tile].threads()
         : family(tile) == Family::kSm90 ? tile_sm90(tile).size().threads()
                                         : tile_decode(tile).threads();
}

// Blocks an SM can hold at once, as far as registers go.
constexpr int blocks(int tile) {
  return family(tile) == Family::kSm80   ? kTiles[tile].min_blocks
         : family(tile) == Family::kSm90 ? tile_sm90(tile).size().blocks()
                                         : tile_decode(tile).blocks;
}

}  // namespace sparse_marlin
