// attention on AVX512: 6 keys (or features) x 64 query rows, 24 accumulators + 4 vectors + 1 broadcast of 32 registers.
#include "simd/avx512.h"

#include "ops/attention/op.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int nv = 4, most_few_rows = 12;
constexpr int key_spans = 2, few_vectors = 4;  // 2 x 8 columns + 2 x 4 scores; 4 rows x 4 vectors

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA

#include "ops/attention/tile.h"

namespace halfbyte::attention {

constinit const Kernel kernel_avx512 = {
    {"attention_6x64x1_avx512", "avx512", isa_avx512},
    HALFBYTE_ISA::task,
};

}  // namespace halfbyte::attention
