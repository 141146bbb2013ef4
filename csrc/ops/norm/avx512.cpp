// norm on AVX512.
#include "simd/avx512.h"

#include "ops/norm/tile.h"

namespace halfbyte::norm {

constinit const Kernel kernel_avx512 = {
    {"norm_avx512", "avx512", isa_avx512},
    HALFBYTE_ISA::norm_rows,
};

}  // namespace halfbyte::norm
