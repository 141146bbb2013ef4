// quantize_rows on AVX512.
#include "simd/avx512.h"

#include "ops/quantize_rows/tile.h"

namespace halfbyte::quantize_rows {

constinit const Kernel kernel_avx512 = {
    {"quantize_rows_avx512", "avx512", isa_avx512},
    HALFBYTE_ISA::rows,
};

}  // namespace halfbyte::quantize_rows
