// Ceilings of AVX2: vpmaddubsw + vpmaddwd + vpaddd, the usual way to multiply 32 pairs of bytes (two multiplier slots;
// the two vpmaddwd of our exact kernel take as many), in 12 independent chains; 32-byte loads.
#include "ceiling/kernel.h"
#include "ceiling/read256.h"

namespace halfbyte::avx2 {
namespace {

int64_t multiply_adds(int64_t rounds) {
  constexpr int chains = 12;
  I acc[chains];
#pragma GCC unroll 12
  for (int i = 0; i < chains; ++i) acc[i] = _mm256_setzero_si256();
  I x = set1_i(0x01010101);
  const I ones = _mm256_set1_epi16(1);
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) {
      asm volatile("" : "+x"(x));  // keeps the products of different chains from being computed once
      acc[i] = add_i(acc[i], _mm256_madd_epi16(_mm256_maddubs_epi16(x, x), ones));
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < chains; ++i) asm volatile("" ::"x"(acc[i]));
  return rounds * chains * 32;
}

}  // namespace
}  // namespace halfbyte::avx2

namespace halfbyte {
constinit const Ceiling ceiling_avx2 = {"avx2", isa_avx2, avx2::multiply_adds, avx2::read};
}
