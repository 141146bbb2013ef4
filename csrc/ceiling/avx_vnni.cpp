// Ceilings of AVX-VNNI: 12 independent vpdpbusd chains on ymm registers, 32-byte loads.
#include "ceiling/kernel.h"
#include "ceiling/read256.h"
#include "simd/vnni256.h"

namespace halfbyte::avx_vnni {
namespace {

int64_t multiply_adds(int64_t rounds) {
  constexpr int chains = 12;
  I acc[chains];
#pragma GCC unroll 12
  for (int i = 0; i < chains; ++i) acc[i] = _mm256_setzero_si256();
  const I x = set1_i(1);
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) dot4(acc[i], x, x);
  }
#pragma GCC unroll 12
  for (int i = 0; i < chains; ++i) asm volatile("" ::"x"(acc[i]));
  return rounds * chains * 32;
}

}  // namespace
}  // namespace halfbyte::avx_vnni

namespace halfbyte {
constinit const Ceiling ceiling_avx_vnni = {"avx_vnni", isa_avx_vnni, avx_vnni::multiply_adds, avx_vnni::read};
}
