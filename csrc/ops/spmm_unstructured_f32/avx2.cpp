// spmm_unstructured_f32 on AVX2: 64 rows.
#include "simd/avx2.h"

#include "simd/epilogue.h"
#include "tiles/sparse/masks.h"

#include "ops/spmm_unstructured_f32/kernel.h"

namespace halfbyte::avx2 {
namespace {

void mask_tile(const TileArgs& t) { mask_tiles[mask_lanes(t.rows) / width - 1](t); }
void arrange(const ArrangeArgs& args) { arrange_units<1, 0>(args, mask_lanes(args.rows)); }

}  // namespace
}  // namespace halfbyte::avx2

namespace halfbyte::spmm_unstructured_f32 {

constinit const GemmKernel kernel_avx2 = {
    .info = {"spmm_unstructured_f32_64x1x1_avx2", "avx2", isa_avx2},
    .wide = false,
    .grain = 1 << 15,
    .grouped = {.mr = avx2::mask_mr, .alone = avx2::mask_mr, .row_step = avx2::width,
                .accumulators = max_panels * avx2::mask_mr, .run = avx2::mask_tile,
                .arrange = avx2::arrange, .strip_bytes = avx2::float_strip_bytes},
    .epilogue = avx2::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::spmm_unstructured_f32
