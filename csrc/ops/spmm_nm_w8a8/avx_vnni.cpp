// spmm_nm_w8a8 on AVX-VNNI: the windows become dense blocks in L1, so that bytes are saved, not time.
#include "simd/vnni256.h"

#include "simd/epilogue.h"
#include "tiles/sparse/blocks_int8.h"
#include "tiles/sparse/windows.h"

#include "ops/spmm_nm_w8a8/kernel.h"

namespace halfbyte::avx_vnni {
namespace {

void window_tile(const TileArgs& t) { multiply_blocks<ByteUnits, ExpandedWindows>(t, reinterpret_cast<float*>(t.acc)); }

}  // namespace
}  // namespace halfbyte::avx_vnni

namespace halfbyte::spmm_nm_w8a8 {

constinit const GemmKernel kernel_avx_vnni = {
    .info = {"spmm_nm_w8a8_24x4x4_avx_vnni", "avx_vnni", isa_avx_vnni},
    .wide = false,
    .grain = 1 << 18,
    .grouped = {},
    .epilogue = avx_vnni::epilogue,
    .plain = {.mr = avx_vnni::block_mr, .alone = avx_vnni::block_mr, .row_step = avx_vnni::width,
              .accumulators = max_panels * avx_vnni::block_mr, .run = avx_vnni::window_tile,
              .arrange = avx_vnni::arrange_bytes, .strip_bytes = avx_vnni::byte_strip_bytes, .offset = avx_vnni::block_offset},
};

}  // namespace halfbyte::spmm_nm_w8a8
