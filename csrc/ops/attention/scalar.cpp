// attention on the baseline instruction set, one number at a time.
#include "simd/scalar.h"

#include "ops/attention/op.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int nv = 2, most_few_rows = 4;
constexpr int key_spans = 1, few_vectors = 1;

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA

#include "ops/attention/tile.h"

namespace halfbyte::attention {

constinit const Kernel kernel_scalar = {
    {"attention_6x2x1_scalar", "scalar", isa_scalar},
    HALFBYTE_ISA::task,
};

}  // namespace halfbyte::attention
