// linear_w8a8 on the baseline instruction set: the formula over packed data, four rows at a time so that a loaded
// weight is used four times.
#include "simd/scalar.h"

#include "ops/linear_w8a8/kernel.h"
#include "simd/epilogue.h"

namespace halfbyte::scalar {
namespace {

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

void tile(const TileArgs& t) {
  switch (t.rows) {
    case 1: return tile_rows<1>(t);
    case 2: return tile_rows<2>(t);
    case 3: return tile_rows<3>(t);
    default: return tile_rows<4>(t);
  }
}

}  // namespace
}  // namespace halfbyte::scalar

namespace halfbyte::linear_w8a8 {

constinit const GemmKernel kernel_scalar = {
    .info = {"linear_w8a8_4x32x4_scalar", "scalar", isa_scalar},
    .mr = 4,
    .row_step = 1,
    .wide = false,
    .accumulators = 1,
    .grain = 1 << 13,
    .tile = scalar::tile,
    .epilogue = scalar::epilogue,
};

}  // namespace halfbyte::linear_w8a8
