// quantize_rows on AVX2.
#include "simd/avx2.h"

#include "ops/quantize_rows/tile.h"

namespace halfbyte::quantize_rows {

constinit const Kernel kernel_avx2 = {
    {"quantize_rows_avx2", "avx2", isa_avx2},
    HALFBYTE_ISA::rows,
};

}  // namespace halfbyte::quantize_rows
