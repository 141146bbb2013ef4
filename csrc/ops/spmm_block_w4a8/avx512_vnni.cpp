// spmm_block_w4a8 on AVX512-VNNI: tiles of 48 rows x 4 channels (tiles/sparse/blocks_int4.h).
#include "simd/vnni512.h"

#include "simd/epilogue.h"
#include "tiles/sparse/blocks_int4.h"

#include "ops/spmm_block_w4a8/kernel.h"

namespace halfbyte::spmm_block_w4a8 {

constinit const GemmKernel kernel_avx512_vnni = {
    .info = {"spmm_block_w4a8_48x4x4_avx512_vnni", "avx512_vnni", isa_avx512_vnni},
    .wide = false,
    .grain = 1 << 19,
    .grouped = {.mr = avx512_vnni::block_mr, .alone = avx512_vnni::block_mr, .row_step = avx512_vnni::width,
                .accumulators = max_panels * avx512_vnni::block_mr, .run = avx512_vnni::int4_block_tile,
                .arrange = avx512_vnni::arrange_bytes, .strip_bytes = avx512_vnni::byte_strip_bytes},
    .epilogue = avx512_vnni::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::spmm_block_w4a8
