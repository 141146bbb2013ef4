// Ceilings of the baseline: four chains of 32-bit multiply and add, 8-byte loads.
#include "ceiling/kernel.h"

namespace halfbyte::scalar {
namespace {

int64_t multiply_adds(int64_t rounds) {
  uint32_t acc[4] = {}, x = 3;
  for (int64_t n = 0; n < rounds; ++n) {
    for (uint32_t& chain : acc) {
      asm volatile("" : "+r"(x));
      chain += x * x;
    }
  }
  asm volatile("" ::"r"(acc[0]), "r"(acc[1]), "r"(acc[2]), "r"(acc[3]));
  return rounds * 4;
}

uint64_t read(const void* data, int64_t bytes) {
  const uint64_t* p = static_cast<const uint64_t*>(data);
  uint64_t sum = 0;
  for (int64_t i = 0; i < bytes / 8; ++i) sum |= p[i];
  return sum;
}

}  // namespace
}  // namespace halfbyte::scalar

namespace halfbyte {
constinit const Ceiling ceiling_scalar = {"scalar", isa_scalar, scalar::multiply_adds, scalar::read};
}
