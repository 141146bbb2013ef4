// linear_w8a16 on AVX-VNNI.
#include "tiles/avx_vnni.h"

#include "ops/linear_w8a16/kernel.h"

namespace halfbyte::linear_w8a16 {

constinit const GemmKernel kernel_avx_vnni = {
    .info = {"linear_w8a16_6x32x4_avx_vnni", "avx_vnni", isa_avx_vnni},
    .wide = false,
    .grain = 1 << 18,
    .grouped = {avx_vnni::mr, avx_vnni::mr, 1, 1, avx_vnni::bytes_a16},
    .epilogue = avx_vnni::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::linear_w8a16
