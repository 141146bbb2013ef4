// exp, and the activations of the epilogue, over the vector vocabulary. Every instruction set performs the same
// operations in the same order (fma included), so results are equal bit for bit.
#pragma once

namespace halfbyte::HALFBYTE_ISA {
namespace {

#ifndef HALFBYTE_INLINE
#define HALFBYTE_INLINE inline
#endif

// exp(x) = 2^n exp(r), n = rint(x / ln 2), |r| <= ln(2)/2; a degree-6 polynomial fitted for the relative error (4e-9,
// below half an ulp). x is clamped to [-87, 88]: normal numbers only.
HALFBYTE_INLINE F exp(F x) {
  x = max(set1(-87.0f), min(set1(88.0f), x));
  const I n = to_int(mul(x, set1(0x1.715476p+0f)));
  const F nf = to_float(n);
  F r = fma(nf, set1(-0x1.62e4p-1f), x);  // ln 2 in two parts; the first has few bits, its products are exact
  r = fma(nf, set1(-0x1.7f7d1cp-20f), r);
  F p = set1(0.001381461275741458f);
  p = fma(p, r, set1(0.008368710055947304f));
  p = fma(p, r, set1(0.04166838899254799f));
  p = fma(p, r, set1(0.1666652113199234f));
  p = fma(p, r, set1(0.4999999403953552f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return mul(p, pow2(n));
}

// x / (1 + exp(-t))
HALFBYTE_INLINE F times_sigmoid(F x, F t) { return div(x, add(set1(1.0f), exp(sub(set1(0.0f), t)))); }

template <Activation A>
HALFBYTE_INLINE F activate(F x) {
  if constexpr (A == Activation::relu) {
    return max(set1(0.0f), x);
  } else if constexpr (A == Activation::silu) {
    return times_sigmoid(x, x);
  } else if constexpr (A == Activation::gelu_tanh) {
    // 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
    const F x2 = mul(x, x);
    return times_sigmoid(x, mul(x, fma(x2, set1(0.0713548162726f), set1(1.59576912161f))));
  } else if constexpr (A == Activation::gelu) {
    // 0.5 x (1 + erf(x / sqrt 2)); erf(x / sqrt 2) = x P(x^2) / Q(x^2), fitted on |x| <= 5.54 (absolute error 2e-8), where
    // it reaches 1 - 3e-8. All coefficients are positive: no cancellation.
    const F t = max(set1(-5.54f), min(set1(5.54f), x));
    const F u = mul(t, t);
    F p = set1(4.496140348919653e-08f);
    p = fma(p, u, set1(1.2704923392448109e-05f));
    p = fma(p, u, set1(0.0003419181448407471f));
    p = fma(p, u, set1(0.009379874914884567f));
    p = fma(p, u, set1(0.06815270334482193f));
    p = fma(p, u, set1(0.797884464263916f));
    F q = set1(1.1897031981789041e-06f);
    q = fma(q, u, set1(7.425765215884894e-05f));
    q = fma(q, u, set1(0.0018965458730235696f));
    q = fma(q, u, set1(0.02877124585211277f));
    q = fma(q, u, set1(0.25208258628845215f));
    q = fma(q, u, set1(1.0f));
    // Bounded below: beyond -5.54 the result is a rounding error of erf, which x must not blow up.
    const F half = mul(set1(0.5f), max(set1(-5.54f), x));
    return fma(half, div(mul(t, p), q), half);
  } else {
    return x;
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
