// linear_w4a16 on AVX512-VNNI.
#include "tiles/avx512_vnni.h"

#include "ops/linear_w4a16/kernel.h"

namespace halfbyte::avx512_vnni {
namespace {

void tile(const TileArgs& t) { return t.nf4 ? tile_a16<Nf4>(t) : tile_a16<Nibbles>(t); }

}  // namespace
}  // namespace halfbyte::avx512_vnni

namespace halfbyte::linear_w4a16 {

constinit const GemmKernel kernel_avx512_vnni = {
    .info = {"linear_w4a16_6x32x4_avx512_vnni", "avx512_vnni", isa_avx512_vnni},
    .wide = false,
    .grain = 1 << 18,
    .grouped = {avx512_vnni::mr, avx512_vnni::mr, 1, avx512_vnni::wide_accumulators, avx512_vnni::tile},
    .epilogue = avx512_vnni::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::linear_w4a16
