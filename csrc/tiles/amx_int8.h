// Tiles of the linear ops on AMX: two tiles of 16 rows of activations times two tiles of 16 channels, 32x32 in four accumulator
// tiles, 64 k per step. The packed panel is already what tdpbsud wants: a weight tile is 16 quads (rows, 128 bytes
// apart in the panel) of 16 channels. Nibbles become such a panel in L1 first.
#pragma once
#include <string.h>

#include "simd/avx512.h"

#include "simd/amx.h"
#include "simd/epilogue.h"
#include "tiles/groups.h"

namespace halfbyte::amx_int8 {
namespace {

constexpr int mr = 32, tile_rows = 16, quads_per_tile = 16;

// Tiles 0-3 accumulate (row half, channel half), 4-5 hold activations, 6-7 weights.
template <bool two>
void tile_of(const TileArgs& t) {
  const int first_rows = t.rows < tile_rows ? t.rows : tile_rows;
  const int second_rows = t.rows - first_rows;
  TileConfig config = {};
  config.palette = 1;
  // A group of 32 k has 8 quads, anything else whole multiples of 16.
  const int step = t.quads < quads_per_tile ? static_cast<int>(t.quads) : quads_per_tile;
  const int rows[8] = {first_rows, first_rows, second_rows, second_rows, first_rows, second_rows, step, step};
  for (int i = 0; i < 8; ++i) {
    const int bytes = i == 4 || i == 5 ? step * quad : 64;
    config.rows[i] = static_cast<uint8_t>(rows[i]);
    config.column_bytes[i] = static_cast<uint16_t>(rows[i] ? bytes : 0);
  }
  tile_loadconfig(config);
  tile_zero<0>(), tile_zero<1>();
  if constexpr (two) tile_zero<2>(), tile_zero<3>();
  const int8_t* a = static_cast<const int8_t*>(t.a);
  const int64_t line = panel_width * quad;
  for (int64_t q = 0; q < t.quads; q += step) {
    const uint8_t* b = t.b + q * line;
    tile_load<6>(b, line);
    tile_load<7>(b + 64, line);
    tile_load<4>(a + q * quad, t.lda);
    tile_dot_su<0, 4, 6>();
    tile_dot_su<1, 4, 7>();
    if constexpr (two) {
      tile_load<5>(a + tile_rows * t.lda + q * quad, t.lda);
      tile_dot_su<2, 5, 6>();
      tile_dot_su<3, 5, 7>();
    }
  }
  constexpr int64_t row_bytes = panel_width * 4;
  tile_store<0>(t.acc, row_bytes);
  tile_store<1>(t.acc + 16, row_bytes);
  if constexpr (two) {
    tile_store<2>(t.acc + tile_rows * panel_width, row_bytes);
    tile_store<3>(t.acc + tile_rows * panel_width + 16, row_bytes);
  }
  tile_release();
}

void byte_sums(const TileArgs& t) { return t.rows > tile_rows ? tile_of<true>(t) : tile_of<false>(t); }

constexpr auto bytes_a8 = tile_in_groups<byte_sums, 8, 1, mr, int8_t>;
constexpr auto bytes_a16 = tile_in_groups<byte_sums, 8, 2, mr, int8_t>;
constexpr auto nibbles_a8 = tile_in_groups<nibble_sums<byte_sums, mr, int8_t>, 4, 1, mr, int8_t>;
constexpr auto nibbles_a16 = tile_in_groups<nibble_sums<byte_sums, mr, int8_t>, 4, 2, mr, int8_t>;

}  // namespace
}  // namespace halfbyte::amx_int8
