// spmm_block_f32 on the baseline instruction set.
#include "simd/scalar.h"

#include "simd/epilogue.h"
#include "tiles/sparse/blocks.h"

#include "ops/spmm_block_f32/kernel.h"

namespace halfbyte::scalar {
namespace {

void block_tile(const TileArgs& t) { multiply_blocks<FloatUnits, PanelBlocks<FloatUnits>>(t, t.t); }
void arrange(const ArrangeArgs& args) { arrange_units<1, 0>(args, lanes_of(args.rows)); }

}  // namespace
}  // namespace halfbyte::scalar

namespace halfbyte::spmm_block_f32 {

constinit const GemmKernel kernel_scalar = {
    .info = {"spmm_block_f32_4x4x1_scalar", "scalar", isa_scalar},
    .wide = false,
    .grain = 1 << 11,
    .grouped = {.mr = scalar::block_mr, .alone = scalar::block_mr, .row_step = scalar::width,
                .accumulators = max_panels * scalar::block_mr, .run = scalar::block_tile,
                .arrange = scalar::arrange, .strip_bytes = scalar::float_strip_bytes},
    .epilogue = scalar::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::spmm_block_f32
