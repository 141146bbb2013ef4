// spmm_block_f32 on AVX512: tiles of 48 rows x 8 channels (tiles/sparse/blocks.h).
#include "simd/avx512.h"

#include "simd/epilogue.h"
#include "tiles/sparse/blocks.h"

#include "ops/spmm_block_f32/kernel.h"

namespace halfbyte::avx512 {
namespace {

void block_tile(const TileArgs& t) { multiply_blocks<FloatUnits, PanelBlocks<FloatUnits>>(t, t.t); }
void arrange(const ArrangeArgs& args) { arrange_units<1, 0>(args, lanes_of(args.rows)); }

}  // namespace
}  // namespace halfbyte::avx512

namespace halfbyte::spmm_block_f32 {

constinit const GemmKernel kernel_avx512 = {
    .info = {"spmm_block_f32_48x8x1_avx512", "avx512", isa_avx512},
    .wide = false,
    .grain = 1 << 17,
    .grouped = {.mr = avx512::block_mr, .alone = avx512::block_mr, .row_step = avx512::width,
                .accumulators = max_panels * avx512::block_mr, .run = avx512::block_tile,
                .arrange = avx512::arrange, .strip_bytes = avx512::float_strip_bytes},
    .epilogue = avx512::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::spmm_block_f32
