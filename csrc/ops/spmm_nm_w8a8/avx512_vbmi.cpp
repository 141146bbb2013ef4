// spmm_nm_w8a8 on AVX512-VBMI.
#include "tiles/sparse/avx512_vbmi.h"

#include "ops/spmm_nm_w8a8/kernel.h"

namespace halfbyte::spmm_nm_w8a8 {

constinit const GemmKernel kernel_avx512_vbmi = {
    .info = {"spmm_nm_w8a8_12x16x4_avx512_vbmi", "avx512_vbmi", isa_avx512_vbmi},
    .wide = false,
    .grain = 1 << 18,
    .grouped = {},
    .epilogue = avx512_vbmi::epilogue,
    .plain = {.mr = avx512_vbmi::window_mr, .alone = avx512_vbmi::window_mr, .row_step = avx512_vbmi::at_once,
              .accumulators = max_panels * avx512_vbmi::window_mr, .run = avx512_vbmi::window_tile,
              .arrange = avx512_vbmi::arrange_windows, .strip_bytes = avx512_vbmi::window_strip_bytes, .offset = 128},
};

}  // namespace halfbyte::spmm_nm_w8a8
