// The int8 dot product of AVX512-VNNI.
#pragma once
#include "simd/avx512.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// acc += four u8 x s8 products per lane. gcc 12 copies whole accumulator arrays around _mm512_dpbusd_epi32 and halves
// the speed of a tile; as an opaque instruction with a read-write operand it stays in place.
HALFBYTE_INLINE void dot4(I& acc, I u8, I s8) { asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8)); }

// Four int8 to every lane, straight from memory: a load, no shuffle.
HALFBYTE_INLINE I broadcast_quad(const void* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
