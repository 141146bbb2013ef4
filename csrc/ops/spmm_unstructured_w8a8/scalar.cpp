// spmm_unstructured_w8a8 on the baseline instruction set: the windows become dense blocks in L1, so that bytes are saved, not time.
#include "simd/dot_scalar.h"

#include "simd/epilogue.h"
#include "tiles/sparse/blocks_int8.h"
#include "tiles/sparse/windows.h"

#include "ops/spmm_unstructured_w8a8/kernel.h"

namespace halfbyte::scalar {
namespace {

void window_tile(const TileArgs& t) { multiply_blocks<ByteUnits, ExpandedWindows>(t, reinterpret_cast<float*>(t.acc)); }

}  // namespace
}  // namespace halfbyte::scalar

namespace halfbyte::spmm_unstructured_w8a8 {

constinit const GemmKernel kernel_scalar = {
    .info = {"spmm_unstructured_w8a8_4x4x4_scalar", "scalar", isa_scalar},
    .wide = false,
    .grain = 1 << 12,
    .grouped = {},
    .epilogue = scalar::epilogue,
    .plain = {.mr = scalar::block_mr, .alone = scalar::block_mr, .row_step = scalar::width,
              .accumulators = max_panels * scalar::block_mr, .run = scalar::window_tile,
              .arrange = scalar::arrange_bytes, .strip_bytes = scalar::byte_strip_bytes, .offset = scalar::block_offset},
};

}  // namespace halfbyte::spmm_unstructured_w8a8
