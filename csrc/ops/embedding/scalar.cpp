// embedding on the baseline instruction set.
#include "simd/scalar.h"

#include "ops/embedding/op.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

using Bytes = int8_t;

inline Bytes eight_bits(const void* row, int64_t i) { return static_cast<const int8_t*>(row)[i]; }
inline Bytes four_bits(const void* row, int64_t i) {
  return static_cast<Bytes>(static_cast<const uint8_t*>(row)[i / 2] >> (i % 2 * 4) & 15);
}
inline Bytes nf4(Bytes u) { return nf4_levels[u]; }
inline I widen(Bytes c) { return c; }
inline float half(const void* p) { return load<DType::f16>(p); }

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA

#include "ops/embedding/tile.h"

namespace halfbyte::embedding {

constinit const Kernel kernel_scalar = {
    {"embedding_scalar", "scalar", isa_scalar},
    HALFBYTE_ISA::rows,
};

}  // namespace halfbyte::embedding
