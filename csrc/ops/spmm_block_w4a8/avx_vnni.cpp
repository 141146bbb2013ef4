// spmm_block_w4a8 on AVX-VNNI: tiles of 24 rows x 2 channels.
#include "simd/vnni256.h"

#include "simd/epilogue.h"
#include "tiles/sparse/blocks_int4.h"

#include "ops/spmm_block_w4a8/kernel.h"

namespace halfbyte::spmm_block_w4a8 {

constinit const GemmKernel kernel_avx_vnni = {
    .info = {"spmm_block_w4a8_24x2x4_avx_vnni", "avx_vnni", isa_avx_vnni},
    .wide = false,
    .grain = 1 << 18,
    .grouped = {.mr = avx_vnni::block_mr, .alone = avx_vnni::block_mr, .row_step = avx_vnni::width,
                .accumulators = max_panels * avx_vnni::block_mr, .run = avx_vnni::int4_block_tile,
                .arrange = avx_vnni::arrange_bytes, .strip_bytes = avx_vnni::byte_strip_bytes},
    .epilogue = avx_vnni::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::spmm_block_w4a8
