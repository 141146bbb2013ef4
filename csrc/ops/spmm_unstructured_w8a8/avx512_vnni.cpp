// spmm_unstructured_w8a8 on AVX512-VNNI without vpermb: the windows become dense blocks in L1, so that bytes are saved, not time.
#include "simd/vnni512.h"

#include "simd/epilogue.h"
#include "tiles/sparse/blocks_int8.h"
#include "tiles/sparse/windows.h"

#include "ops/spmm_unstructured_w8a8/kernel.h"

namespace halfbyte::avx512_vnni {
namespace {

void window_tile(const TileArgs& t) { multiply_blocks<ByteUnits, ExpandedWindows>(t, reinterpret_cast<float*>(t.acc)); }

}  // namespace
}  // namespace halfbyte::avx512_vnni

namespace halfbyte::spmm_unstructured_w8a8 {

constinit const GemmKernel kernel_avx512_vnni = {
    .info = {"spmm_unstructured_w8a8_48x8x4_avx512_vnni", "avx512_vnni", isa_avx512_vnni},
    .wide = false,
    .grain = 1 << 19,
    .grouped = {},
    .epilogue = avx512_vnni::epilogue,
    .plain = {.mr = avx512_vnni::block_mr, .alone = avx512_vnni::block_mr, .row_step = avx512_vnni::width,
              .accumulators = max_panels * avx512_vnni::block_mr, .run = avx512_vnni::window_tile,
              .arrange = avx512_vnni::arrange_bytes, .strip_bytes = avx512_vnni::byte_strip_bytes, .offset = avx512_vnni::block_offset},
};

}  // namespace halfbyte::spmm_unstructured_w8a8
