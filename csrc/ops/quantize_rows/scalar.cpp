// quantize_rows on the baseline instruction set.
#include "simd/scalar.h"

#include "ops/quantize_rows/tile.h"

namespace halfbyte::quantize_rows {

constinit const Kernel kernel_scalar = {
    {"quantize_rows_scalar", "scalar", isa_scalar},
    HALFBYTE_ISA::rows,
};

}  // namespace halfbyte::quantize_rows
