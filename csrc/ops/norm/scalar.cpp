// norm on the baseline instruction set.
#include "simd/scalar.h"

#include "ops/norm/tile.h"

namespace halfbyte::norm {

constinit const Kernel kernel_scalar = {
    {"norm_scalar", "scalar", isa_scalar},
    HALFBYTE_ISA::norm_rows,
};

}  // namespace halfbyte::norm
