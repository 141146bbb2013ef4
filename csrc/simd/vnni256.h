// The int8 dot product of AVX-VNNI; with HALFBYTE_EMULATE the same function from AVX2 instructions, so that the kernel
// around it can be tested on a CPU without it.
#pragma once
#include "simd/avx2.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// acc += four u8 x s8 products per lane; see simd/vnni512.h for why the real one is inline assembly.
HALFBYTE_INLINE void dot4(I& acc, I u8, I s8) {
#if HALFBYTE_EMULATE
  const I even = _mm256_set1_epi16(0x00ff);
  const I low = _mm256_madd_epi16(_mm256_and_si256(u8, even), _mm256_srai_epi16(_mm256_slli_epi16(s8, 8), 8));
  const I high = _mm256_madd_epi16(_mm256_srli_epi16(u8, 8), _mm256_srai_epi16(s8, 8));
  acc = add_i(acc, add_i(low, high));
#else
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u8), "x"(s8));
#endif
}

HALFBYTE_INLINE I broadcast_quad(const void* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
