// linear_w4a8 on AVX512-VNNI.
#include "tiles/avx512_vnni.h"

#include "ops/linear_w4a8/kernel.h"

namespace halfbyte::linear_w4a8 {

constinit const GemmKernel kernel_avx512_vnni = {
    .info = {"linear_w4a8_6x32x4_avx512_vnni", "avx512_vnni", isa_avx512_vnni},
    .wide = false,
    .grain = 1 << 19,
    .grouped = {avx512_vnni::mr, avx512_vnni::alone, 1, avx512_vnni::accumulators, avx512_vnni::tile_a8<avx512_vnni::Nibbles>},
    .epilogue = avx512_vnni::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::linear_w4a8
