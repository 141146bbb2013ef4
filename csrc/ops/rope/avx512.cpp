// rope on AVX512.
#include "simd/avx512.h"

#include "ops/rope/tile.h"

namespace halfbyte::rope {

constinit const Kernel kernel_avx512 = {
    {"rope_avx512", "avx512", isa_avx512},
    HALFBYTE_ISA::rows,
};

}  // namespace halfbyte::rope
