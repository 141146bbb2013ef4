// A float32 sum over many elements, equal bit for bit on every instruction set: 16 partial sums, element i going to
// partial i mod 16 in order of i, then the tree
//
//   p[j] += p[j + 8] (j < 8),  p[j] += p[j + 4] (j < 4),  p[j] += p[j + 2] (j < 2),  p[0] += p[1]
//
// The partials are one vector of 16 lanes, two of 8, or 16 of one. Included after a simd header. Each element passes at
// most c + 3 roundings, c = ceil(n / 16), since the first addition to zero is exact: to first order the error is below
// (c + 3) 2^-24 sum|x_i|; below (c + 4) 2^-24 sum|a_i b_i| where products join by fma, which rounds the first one, too.
//
// An element that is missing adds nothing: pass 0 for it. No partial is ever -0 (they start at +0, and a sum is -0 only
// where both terms are), so adding a +0 or -0 changes no bit.
#pragma once

namespace halfbyte::HALFBYTE_ISA {
namespace {

#ifndef HALFBYTE_INLINE
#define HALFBYTE_INLINE inline
#endif

struct Sum16 {
  static constexpr int vectors = 16 / width;  // that hold 16 elements
  F part[vectors];

  HALFBYTE_INLINE void clear() {
    for (int v = 0; v < vectors; ++v) part[v] = set1(0);
  }
  // Vector v of the elements: v * width .. v * width + width - 1. Give a v that is a constant once loops are unrolled,
  // or the partials leave their registers: `for (v = 0; v < Sum16::vectors; ++v)` per 16 elements, or each_vector().
  HALFBYTE_INLINE void add(int v, F x) { part[v % vectors] = HALFBYTE_ISA::add(part[v % vectors], x); }
  // a * b joins the sum with one rounding.
  HALFBYTE_INLINE void add_product(int v, F a, F b) { part[v % vectors] = fma(a, b, part[v % vectors]); }

  HALFBYTE_INLINE float total() const {
    F p[vectors];
    for (int v = 0; v < vectors; ++v) p[v] = part[v];
    for (int half = vectors / 2; half > 0; half /= 2) {
      for (int v = 0; v < half; ++v) p[v] = HALFBYTE_ISA::add(p[v], p[v + half]);
    }
    return reduce_add(p[0]);
  }
};

// Calls whole(v, i) for each vector of the elements [0, n), i = its first element, and part(v, i, c) for the last one
// where it has only c < width of them. v is a constant in each call, as Sum16 wants it.
template <class Whole, class Part>
HALFBYTE_INLINE void each_vector(int64_t n, Whole&& whole, Part&& part) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
#pragma GCC unroll 2
    for (int v = 0; v < Sum16::vectors; ++v) whole(v, i + v * width);
  }
#pragma GCC unroll 2
  for (int v = 0; v < Sum16::vectors; ++v) {
    const int64_t at = i + v * width, left = n - at;
    if (left >= width) {
      whole(v, at);
    } else if (left > 0) {
      part(v, at, static_cast<int>(left));
    }
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
