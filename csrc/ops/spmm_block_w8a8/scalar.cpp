// spmm_block_w8a8 on the baseline instruction set.
#include "simd/dot_scalar.h"

#include "simd/epilogue.h"
#include "tiles/sparse/blocks_int8.h"

#include "ops/spmm_block_w8a8/kernel.h"

namespace halfbyte::spmm_block_w8a8 {

constinit const GemmKernel kernel_scalar = {
    .info = {"spmm_block_w8a8_4x4x4_scalar", "scalar", isa_scalar},
    .wide = false,
    .grain = 1 << 12,
    .grouped = {},
    .epilogue = scalar::epilogue,
    .plain = {.mr = scalar::block_mr, .alone = scalar::block_mr, .row_step = scalar::width,
              .accumulators = max_panels * scalar::block_mr, .run = scalar::block_tile,
              .arrange = scalar::arrange_bytes, .strip_bytes = scalar::byte_strip_bytes, .offset = scalar::block_offset},
};

}  // namespace halfbyte::spmm_block_w8a8
