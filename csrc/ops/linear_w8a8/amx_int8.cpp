// linear_w8a8 on AMX: two tiles of 16 rows of activations times two tiles of 16 channels, 32x32 in four accumulator
// tiles, 64 k per step. The packed panel is already what tdpbsud wants: a weight tile is 16 quads (rows, 128 bytes
// apart in the panel) of 16 channels.
#include "simd/avx512.h"

#include "ops/linear_w8a8/kernel.h"
#include "simd/amx.h"
#include "simd/epilogue.h"

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
  const int rows[8] = {first_rows, first_rows, second_rows, second_rows, first_rows, second_rows, tile_rows, tile_rows};
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(rows[i]);
    config.column_bytes[i] = rows[i] ? 64 : 0;
  }
  tile_loadconfig(config);
  tile_zero<0>(), tile_zero<1>();
  if constexpr (two) tile_zero<2>(), tile_zero<3>();
  const int8_t* a = static_cast<const int8_t*>(t.a);
  const int64_t line = panel_width * quad;
  for (int64_t q = 0; q < t.quads; q += quads_per_tile) {
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

void tile(const TileArgs& t) { return t.rows > tile_rows ? tile_of<true>(t) : tile_of<false>(t); }

}  // namespace
}  // namespace halfbyte::amx_int8

namespace halfbyte::linear_w8a8 {

constinit const GemmKernel kernel_amx_int8 = {
    .info = {"linear_w8a8_32x32x64_amx_int8", "amx_int8", isa_amx_int8},
    .mr = amx_int8::mr,
    .row_step = 1,
    .wide = false,
    .accumulators = 1,
    .grain = 1 << 20,
    .tile = amx_int8::tile,
    .epilogue = amx_int8::epilogue,
};

}  // namespace halfbyte::linear_w8a8
