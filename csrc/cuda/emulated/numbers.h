// The 16-bit floats of the GPU on the CPU: every result is rounded once, to the nearest and to even between two.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace halfbyte::cuda::emulated {

// What the GPU makes of every NaN.
constexpr uint16_t canonical_nan = 0x7fff;

inline float widen_f16(uint16_t v) {
  // The bits in the place of a float's are the number times 2^-112, subnormal ones too; infinity and NaN are not.
  const float magnitude = std::bit_cast<float>(static_cast<uint32_t>(v & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (v & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u, sign = static_cast<uint32_t>(v & 0x8000) << 16;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | special | sign);
}
inline float widen_bf16(uint16_t v) { return std::bit_cast<float>(static_cast<uint32_t>(v) << 16); }

// A double as a float of 1 + fraction bits whose smallest normal number is 2^least.
template <int fraction, int least>
inline uint16_t narrow(double v) {
  constexpr uint32_t infinity = 0x7fffu >> fraction << fraction;
  const uint64_t bits = std::bit_cast<uint64_t>(v);
  const uint32_t sign = static_cast<uint32_t>(bits >> 48) & 0x8000;
  const double magnitude = std::fabs(v);
  if (!(magnitude <= 0x1.fffffffffffffp1023)) return magnitude != magnitude ? canonical_nan : sign | infinity;
  const int found = static_cast<int>(bits >> 52 & 0x7ff) - 1023, exponent = found < least ? least : found;
  // In units of the last place the number is below 2^(fraction + 1); next to 2^52 a double is an integer.
  const double units = magnitude * std::bit_cast<double>(static_cast<uint64_t>(1023 + fraction - exponent) << 52);
  const uint32_t rounded = static_cast<uint32_t>(std::bit_cast<uint64_t>(units + 0x1p52) - std::bit_cast<uint64_t>(0x1p52));
  // The leading one of `rounded` adds 1 to the exponent's field, and a carry one more.
  const uint32_t narrowed = (static_cast<uint32_t>(exponent - least) << fraction) + rounded;
  return static_cast<uint16_t>(sign | (narrowed < infinity ? narrowed : infinity));
}
inline uint16_t narrow_f16(double v) { return narrow<10, -14>(v); }
inline uint16_t narrow_bf16(double v) { return narrow<7, -126>(v); }

// a + b rounded to odd: where a double does not hold the sum, that of its two neighbours whose last bit is set. Rounding
// that once more, to a float with fewer bits by 2 or more, gives what rounding the exact sum does, because a tie (its last
// bits are 10...0) comes out only where the sum is one. Rounding to the nearest twice would not: a product of bf16
// numbers can be a tie itself, and an addend 2^-60 of it must break it.
inline double sum_to_odd(double a, double b) {
  const double sum = a + b, of_b = sum - a, error = (a - (sum - of_b)) + (b - of_b);  // Knuth's exact error
  const uint64_t bits = std::bit_cast<uint64_t>(sum);
  if (!(error > 0 || error < 0) || bits & 1) return sum;  // a NaN: the sum is infinite
  return std::bit_cast<double>((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
}

// Products of 11-bit numbers are exact in a double.
inline uint16_t fma_f16(uint16_t a, uint16_t b, uint16_t c) {
  return narrow_f16(sum_to_odd(static_cast<double>(widen_f16(a)) * widen_f16(b), widen_f16(c)));
}
inline uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c) {
  return narrow_bf16(sum_to_odd(static_cast<double>(widen_bf16(a)) * widen_bf16(b), widen_bf16(c)));
}
// From 2^-24 to 2^16: a double holds every difference.
inline uint16_t sub_f16(uint16_t a, uint16_t b) { return narrow_f16(static_cast<double>(widen_f16(a)) - widen_f16(b)); }

constexpr uint16_t low16(uint32_t v) { return static_cast<uint16_t>(v); }
constexpr uint16_t high16(uint32_t v) { return static_cast<uint16_t>(v >> 16); }
constexpr uint32_t pair(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }

}  // namespace halfbyte::cuda::emulated
