// Tiles of the linear ops on the baseline instruction set: the formula over packed data, four rows at a time so that a
// loaded weight is used four times. Nibbles become bytes first.
#pragma once
#include <string.h>

#include "simd/scalar.h"

#include "simd/epilogue.h"
#include "tiles/groups.h"

namespace halfbyte::scalar {
namespace {

constexpr int mr = 4;

template <int rows>
void tile_rows(const TileArgs& t) {
  const int8_t* a = static_cast<const int8_t*>(t.a);
  int32_t acc[rows][panel_width] = {};
  for (int64_t q = 0; q < t.quads; ++q) {
    const uint8_t* b = t.b + q * panel_width * quad;
    for (int r = 0; r < rows; ++r) {
      const int8_t* x = a + r * t.lda + q * quad;
      const int32_t x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
      for (int j = 0; j < panel_width; ++j) {
        const uint8_t* w = b + j * quad;
        // Unsigned: the sum may wrap on its way and the epilogue's correction wraps it back.
        acc[r][j] = static_cast<int32_t>(static_cast<uint32_t>(acc[r][j]) +
                                         static_cast<uint32_t>(x0 * w[0] + x1 * w[1] + x2 * w[2] + x3 * w[3]));
      }
    }
  }
  memcpy(t.acc, acc, sizeof acc);
}

void byte_sums(const TileArgs& t) {
  switch (t.rows) {
    case 1: return tile_rows<1>(t);
    case 2: return tile_rows<2>(t);
    case 3: return tile_rows<3>(t);
    default: return tile_rows<4>(t);
  }
}

constexpr auto bytes_a8 = tile_in_groups<byte_sums, 8, 1, mr, int8_t>;
constexpr auto bytes_a16 = tile_in_groups<byte_sums, 8, 2, mr, int8_t>;
constexpr auto nibbles_a8 = tile_in_groups<nibble_sums<byte_sums, mr, int8_t>, 4, 1, mr, int8_t>;
constexpr auto nibbles_a16 = tile_in_groups<nibble_sums<byte_sums, mr, int8_t>, 4, 2, mr, int8_t>;

}  // namespace
}  // namespace halfbyte::scalar
