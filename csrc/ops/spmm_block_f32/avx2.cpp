// spmm_block_f32 on AVX2: tiles of 24 rows x 4 channels.
#include "simd/avx2.h"

#include "simd/epilogue.h"
#include "tiles/sparse/blocks.h"

#include "ops/spmm_block_f32/kernel.h"

namespace halfbyte::avx2 {
namespace {

void block_tile(const TileArgs& t) { multiply_blocks<FloatUnits, PanelBlocks<FloatUnits>>(t, t.t); }
void arrange(const ArrangeArgs& args) { arrange_units<1, 0>(args, lanes_of(args.rows)); }

}  // namespace
}  // namespace halfbyte::avx2

namespace halfbyte::spmm_block_f32 {

constinit const GemmKernel kernel_avx2 = {
    .info = {"spmm_block_f32_24x4x1_avx2", "avx2", isa_avx2},
    .wide = false,
    .grain = 1 << 16,
    .grouped = {.mr = avx2::block_mr, .alone = avx2::block_mr, .row_step = avx2::width,
                .accumulators = max_panels * avx2::block_mr, .run = avx2::block_tile,
                .arrange = avx2::arrange, .strip_bytes = avx2::float_strip_bytes},
    .epilogue = avx2::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::spmm_block_f32
