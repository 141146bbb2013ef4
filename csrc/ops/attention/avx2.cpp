// attention on AVX2: 6 keys (or features) x 16 query rows, 12 accumulators + 2 vectors + 1 broadcast of 16 registers.
#include "simd/avx2.h"

#include "ops/attention/op.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int nv = 2, most_few_rows = 4;
constexpr int key_spans = 1, few_vectors = 2;  // 8 columns + 4 scores; 4 rows x 2 vectors

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA

#include "ops/attention/tile.h"

namespace halfbyte::attention {

constinit const Kernel kernel_avx2 = {
    {"attention_6x16x1_avx2", "avx2", isa_avx2},
    HALFBYTE_ISA::task,
};

}  // namespace halfbyte::attention
