// linear_w4a16 on the baseline instruction set.
#include "tiles/scalar.h"

#include "ops/linear_w4a16/kernel.h"

namespace halfbyte::linear_w4a16 {

constinit const GemmKernel kernel_scalar = {
    .info = {"linear_w4a16_4x32x4_scalar", "scalar", isa_scalar},
    .wide = false,
    .grain = 1 << 13,
    .grouped = {scalar::mr, scalar::mr, 1, 1, scalar::nibbles_a16},
    .epilogue = scalar::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::linear_w4a16
