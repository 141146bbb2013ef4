// Ceiling of AMX: four independent tdpbsud chains of 16x16x64; the read ceiling is AVX512's.
#include "ceiling/kernel.h"
#include "simd/amx.h"

namespace halfbyte::amx_int8 {
namespace {

int64_t multiply_adds(int64_t rounds) {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.rows[i] = 16, config.column_bytes[i] = 64;
  tile_loadconfig(config);
  for (int64_t n = 0; n < rounds; ++n) {
    tile_dot_su<0, 4, 6>();
    tile_dot_su<1, 4, 7>();
    tile_dot_su<2, 5, 6>();
    tile_dot_su<3, 5, 7>();
  }
  tile_release();
  return rounds * 4 * 16 * 16 * 64;
}

}  // namespace
}  // namespace halfbyte::amx_int8

namespace halfbyte {
constinit const Ceiling ceiling_amx_int8 = {"amx_int8", isa_amx_int8, amx_int8::multiply_adds, nullptr};
}
