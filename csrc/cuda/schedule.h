// How a linear call is cut into blocks and warps: plain integer functions, for the host, the tests and the kernels.
#pragma once
#include "cuda/device.h"
#include "cuda/layout.h"

namespace halfbyte::cuda {

struct Schedule {
  int arch;     // 80 or 90: which kernels
  int columns;  // rows of x that a block multiplies by, in units of 8: 1, 2 or 4
  int warps;    // of a block, 4 or 8; they share out k (with a gate, each half of them one weight's)
  int splits;   // blocks that share out k
  int stages;   // tiles that a warp holds or awaits, 2 or 3

  constexpr int rows() const { return 8 * columns; }
};

constexpr int barrier_bytes = 256;  // before the tiles of the kernels of sm90: 8 warps x 3 stages x 8 bytes, rounded up

HALFBYTE_HD constexpr int shared_bytes(const Schedule& s, int tile_bytes) {
  return (s.arch == 90 ? barrier_bytes : 0) + s.warps * s.stages * tile_bytes;
}

// The sums of all warps, of 64 channels and up to 32 rows, take the place of the tiles: 8 KiB a warp, less than two tiles.
static_assert(tile_n * 32 * 4 <= 2 * WeightFormat{4, 0, 0, false}.tile_bytes());

// Three stages hide the latency of memory; eight warps share out k, and where two blocks fit a processor it has sixteen.
constexpr void fit(Schedule& s, int tile_bytes, const Device& device, int forced_warps) {
  for (int warps = 8; warps >= 4; warps /= 2) {
    for (int stages = 3; stages >= 2; --stages) {
      if (forced_warps && warps != forced_warps) continue;
      s.warps = warps;
      s.stages = stages;
      if (shared_bytes(s, tile_bytes) <= device.shared_bytes) return;
    }
  }
}

// Nothing here but `columns` depends on m, and `columns` changes no sum: a row's result does not depend on the others.
// 0 is no force.
constexpr Schedule choose_schedule(const Device& device, const WeightFormat& f, int64_t m, int64_t n, int64_t k, bool gated,
                                   int forced_warps, int forced_splits) {
  Schedule best{device.arch >= 90 && device.arch < 100 ? 90 : 80, m <= 8 ? 1 : m <= 16 ? 2 : 4, 8, 1, 3};
  fit(best, f.tile_bytes(), device, forced_warps);
  if (forced_splits) {
    best.splits = forced_splits;
    return best;
  }
  // The time of the busiest processor, in tiles: its blocks' shares of k, a quarter more where they are too few warps to hide
  // the latency of the arithmetic (a warp alone takes some 1000 cycles for a tile of 4 bits; memory brings a processor one
  // every 256: 4.3 TB/s, 132 processors, 1.9 GHz), and a beginning and an end worth six tiles for each round of blocks that
  // run at once; blocks that split k meet once more. A guess to be replaced by measurements.
  const int64_t warps = best.warps / (gated ? 2 : 1);
  const int resident = 2 * (shared_bytes(best, f.tile_bytes()) + 1024) <= device.shared_bytes + 1024 ? 2 : 1;
  int64_t least = 0;
  for (int splits = 1; splits <= 8; splits *= 2) {
    const int64_t blocks = ceil_div(n_tiles(n) * splits, device.processors);
    const int64_t tiles = blocks * ceil_div(k_tiles(k), splits * warps) * best.warps;
    const bool busy = (blocks < resident ? blocks : resident) * best.warps >= 16;
    const int64_t cost = 4 * (busy ? tiles : tiles + tiles / 4) + 24 * ceil_div(blocks, resident) + (splits > 1 ? 12 : 0);
    if (splits == 1 || cost < least) {
      least = cost;
      best.splits = splits;
    }
  }
  return best;
}

}  // namespace halfbyte::cuda
