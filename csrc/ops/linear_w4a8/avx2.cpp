// linear_w4a8 on AVX2.
#include "tiles/avx2.h"

#include "ops/linear_w4a8/kernel.h"

namespace halfbyte::linear_w4a8 {

constinit const GemmKernel kernel_avx2 = {
    .info = {"linear_w4a8_24x32x4_avx2", "avx2", isa_avx2},
    .wide = false,
    .grain = 1 << 18,
    .grouped = {avx2::nibble_mr, avx2::nibble_mr, avx2::strip, 1, avx2::nibbles_a8},
    .epilogue = avx2::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::linear_w4a8
