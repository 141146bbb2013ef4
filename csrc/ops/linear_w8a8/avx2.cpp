// linear_w8a8 on AVX2.
#include "tiles/avx2.h"

#include "ops/linear_w8a8/kernel.h"

namespace halfbyte::linear_w8a8 {

constinit const GemmKernel kernel_avx2 = {
    .info = {"linear_w8a8_48x32x4_avx2", "avx2", isa_avx2},
    .wide = true,
    .grain = 1 << 17,
    .grouped = {avx2::mr, avx2::mr, avx2::strip, 1, avx2::bytes_a8},
    .epilogue = avx2::epilogue,
    .plain = {avx2::mr, avx2::mr, avx2::strip, 1, avx2::byte_sums},
};

}  // namespace halfbyte::linear_w8a8
