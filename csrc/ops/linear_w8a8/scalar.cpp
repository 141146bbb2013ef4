// linear_w8a8 on the baseline instruction set.
#include "tiles/scalar.h"

#include "ops/linear_w8a8/kernel.h"

namespace halfbyte::linear_w8a8 {

constinit const GemmKernel kernel_scalar = {
    .info = {"linear_w8a8_4x32x4_scalar", "scalar", isa_scalar},
    .wide = false,
    .grain = 1 << 13,
    .grouped = {scalar::mr, scalar::mr, 1, 1, scalar::bytes_a8},
    .epilogue = scalar::epilogue,
    .plain = {scalar::mr, scalar::mr, 1, 1, scalar::byte_sums},
};

}  // namespace halfbyte::linear_w8a8
