// linear_f32 on the baseline instruction set.
#include "simd/scalar.h"

#include "ops/linear_f32/kernel.h"
#include "ops/linear_f32/tile.h"

namespace halfbyte::scalar {
namespace {

constexpr int mr = 4, vectors = 8;  // of a tile in registers

void run_tile(const TileArgs& t) {
  switch (t.rows) {
    case 1: return tile<1, vectors>(t);
    case 2: return tile<2, vectors>(t);
    case 3: return tile<3, vectors>(t);
    default: return tile<mr, vectors>(t);
  }
}

}  // namespace
}  // namespace halfbyte::scalar

namespace halfbyte::linear_f32 {

constinit const GemmKernel kernel_scalar = {
    .info = {"linear_f32_4x8x1_scalar", "scalar", isa_scalar},
    .wide = false,
    .grain = 1 << 11,
    .grouped = {scalar::mr, scalar::mr, 1, 1, scalar::run_tile},
    .epilogue = scalar::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::linear_f32
