// rope on AVX2.
#include "simd/avx2.h"

#include "ops/rope/tile.h"

namespace halfbyte::rope {

constinit const Kernel kernel_avx2 = {
    {"rope_avx2", "avx2", isa_avx2},
    HALFBYTE_ISA::rows,
};

}  // namespace halfbyte::rope
