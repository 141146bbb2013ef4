// spmm_unstructured_f32 on AVX2: 64 rows.
#include "simd/avx2.h"

#include "simd/epilogue.h"
#include "tiles/sparse/lists.h"

#include "ops/spmm_unstructured_f32/kernel.h"

namespace halfbyte::spmm_unstructured_f32 {

constinit const GemmKernel kernel_avx2 = {
    .info = {"spmm_unstructured_f32_64x1x1_avx2", "avx2", isa_avx2},
    .wide = false,
    .grain = 1 << 15,
    .grouped = {.mr = avx2::mask_mr, .alone = avx2::mask_mr, .row_step = avx2::width,
                .accumulators = max_panels * avx2::mask_mr, .run = avx2::tile_anywhere,
                .arrange = avx2::arrange_anywhere, .strip_bytes = avx2::float_strip_bytes},
    .epilogue = avx2::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::spmm_unstructured_f32
