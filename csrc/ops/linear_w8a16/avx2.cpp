// linear_w8a16 on AVX2.
#include "tiles/avx2.h"

#include "ops/linear_w8a16/kernel.h"

namespace halfbyte::linear_w8a16 {

constinit const GemmKernel kernel_avx2 = {
    .info = {"linear_w8a16_48x32x4_avx2", "avx2", isa_avx2},
    .wide = true,
    .grain = 1 << 17,
    .grouped = {avx2::mr, avx2::mr, avx2::strip, 1, avx2::bytes_a16},
    .epilogue = avx2::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::linear_w8a16
