// spmm_block_w4a8 on the baseline instruction set.
#include "simd/dot_scalar.h"

#include "simd/epilogue.h"
#include "tiles/sparse/blocks_int4.h"

#include "ops/spmm_block_w4a8/kernel.h"

namespace halfbyte::spmm_block_w4a8 {

constinit const GemmKernel kernel_scalar = {
    .info = {"spmm_block_w4a8_4x4x4_scalar", "scalar", isa_scalar},
    .wide = false,
    .grain = 1 << 12,
    .grouped = {.mr = scalar::block_mr, .alone = scalar::block_mr, .row_step = scalar::width,
                .accumulators = max_panels * scalar::block_mr, .run = scalar::int4_block_tile,
                .arrange = scalar::arrange_bytes, .strip_bytes = scalar::byte_strip_bytes},
    .epilogue = scalar::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::spmm_block_w4a8
