// rope on the baseline instruction set.
#include "simd/scalar.h"

#include "ops/rope/tile.h"

namespace halfbyte::rope {

constinit const Kernel kernel_scalar = {
    {"rope_scalar", "scalar", isa_scalar},
    HALFBYTE_ISA::rows,
};

}  // namespace halfbyte::rope
