// spmm_block_w4a8 on AVX2.
#include "tiles/sparse/blocks_int4_avx2.h"

#include "ops/spmm_block_w4a8/kernel.h"

namespace halfbyte::spmm_block_w4a8 {

constinit const GemmKernel kernel_avx2 = {
    .info = {"spmm_block_w4a8_6x8x4_avx2", "avx2", isa_avx2},
    .wide = true,
    .grain = 1 << 17,
    .grouped = {.mr = avx2::block_rows, .alone = avx2::block_rows, .row_step = 1,
                .accumulators = max_panels * avx2::block_rows, .run = avx2::word_int4_block_tile,
                .arrange = avx2::arrange_words, .strip_bytes = avx2::word_strip_bytes},
    .epilogue = avx2::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::spmm_block_w4a8
