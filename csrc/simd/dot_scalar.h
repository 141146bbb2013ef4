// The dot product of four int8, for tiles that are written over vectors of any width.
#pragma once
#include "simd/scalar.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// acc += four u8 x s8 products, wrapping.
inline void dot4(I& acc, I u8, I s8) {
  const auto u = static_cast<uint32_t>(u8), s = static_cast<uint32_t>(s8);
  int32_t sum = 0;
  for (int shift = 0; shift < 32; shift += 8) sum += static_cast<int32_t>(u >> shift & 255) * static_cast<int8_t>(s >> shift);
  acc = add_i(acc, sum);
}

inline I broadcast_quad(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
