// spmm_unstructured_f32 on the baseline instruction set.
#include "simd/scalar.h"

#include "simd/epilogue.h"
#include "tiles/sparse/masks.h"

#include "ops/spmm_unstructured_f32/kernel.h"

namespace halfbyte::scalar {
namespace {

void arrange(const ArrangeArgs& args) { arrange_units<1, 0>(args, mask_lanes(args.rows)); }

}  // namespace
}  // namespace halfbyte::scalar

namespace halfbyte::spmm_unstructured_f32 {

constinit const GemmKernel kernel_scalar = {
    .info = {"spmm_unstructured_f32_8x1x1_scalar", "scalar", isa_scalar},
    .wide = false,
    .grain = 1 << 11,
    .grouped = {.mr = scalar::mask_mr, .alone = scalar::mask_mr, .row_step = scalar::width,
                .accumulators = max_panels * scalar::mask_mr, .run = scalar::mask_tile,
                .arrange = scalar::arrange, .strip_bytes = scalar::float_strip_bytes},
    .epilogue = scalar::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::spmm_unstructured_f32
