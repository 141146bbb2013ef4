// norm on AVX2.
#include "simd/avx2.h"

#include "ops/norm/tile.h"

namespace halfbyte::norm {

constinit const Kernel kernel_avx2 = {
    {"norm_avx2", "avx2", isa_avx2},
    HALFBYTE_ISA::norm_rows,
};

}  // namespace halfbyte::norm
