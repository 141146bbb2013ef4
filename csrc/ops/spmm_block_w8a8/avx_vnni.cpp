// spmm_block_w8a8 on AVX-VNNI: tiles of 24 rows x 4 channels.
#include "simd/vnni256.h"

#include "simd/epilogue.h"
#include "tiles/sparse/blocks_int8.h"

#include "ops/spmm_block_w8a8/kernel.h"

namespace halfbyte::spmm_block_w8a8 {

constinit const GemmKernel kernel_avx_vnni = {
    .info = {"spmm_block_w8a8_24x4x4_avx_vnni", "avx_vnni", isa_avx_vnni},
    .wide = false,
    .grain = 1 << 18,
    .grouped = {},
    .epilogue = avx_vnni::epilogue,
    .plain = {.mr = avx_vnni::block_mr, .alone = avx_vnni::block_mr, .row_step = avx_vnni::width,
              .accumulators = max_panels * avx_vnni::block_mr, .run = avx_vnni::block_tile,
              .arrange = avx_vnni::arrange_bytes, .strip_bytes = avx_vnni::byte_strip_bytes, .offset = avx_vnni::block_offset},
};

}  // namespace halfbyte::spmm_block_w8a8
