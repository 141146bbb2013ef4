// linear_f32 on AVX2: 6x16 tiles (12 sums, 2 weight vectors, 1 broadcast), two of them to a panel.
#include "simd/avx2.h"

#include "ops/linear_f32/kernel.h"
#include "ops/linear_f32/tile.h"

namespace halfbyte::avx2 {
namespace {

constexpr int mr = 6, vectors = 2;  // of a tile in registers

void run_tile(const TileArgs& t) {
  switch (t.rows) {
    case 1: return tile<1, vectors>(t);
    case 2: return tile<2, vectors>(t);
    case 3: return tile<3, vectors>(t);
    case 4: return tile<4, vectors>(t);
    case 5: return tile<5, vectors>(t);
    default: return tile<mr, vectors>(t);
  }
}

}  // namespace
}  // namespace halfbyte::avx2

namespace halfbyte::linear_f32 {

constinit const GemmKernel kernel_avx2 = {
    .info = {"linear_f32_6x16x1_avx2", "avx2", isa_avx2},
    .wide = false,
    .grain = 1 << 16,
    .grouped = {avx2::mr, avx2::mr, 1, 1, avx2::run_tile},
    .epilogue = avx2::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::linear_f32
