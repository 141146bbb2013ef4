// Vector vocabulary (see simd/scalar.h) on 512-bit registers: AVX512 F, BW, DQ, VL.
#pragma once
#include <immintrin.h>

#include "core/kernel.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

#define HALFBYTE_INLINE inline __attribute__((always_inline))

using F = __m512;
using I = __m512i;
constexpr int width = 16;

HALFBYTE_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

HALFBYTE_INLINE F from_bf16(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
// Round to nearest even by integer arithmetic; NaN keeps its upper half with the quiet bit set.
HALFBYTE_INLINE __m256i to_bf16(F x) {
  const I u = _mm512_castps_si512(x);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  I rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(rounded);
}
constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

template <DType D>
HALFBYTE_INLINE F load(const void* p) {
  if constexpr (D == DType::f32) return _mm512_loadu_ps(p);
  const __m256i h = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return D == DType::bf16 ? from_bf16(h) : _mm512_cvtph_ps(h);
}
template <DType D>
HALFBYTE_INLINE F load_n(const void* p, int n) {
  if constexpr (D == DType::f32) return _mm512_maskz_loadu_ps(first(n), p);
  const __m256i h = _mm256_maskz_loadu_epi16(first(n), p);
  return D == DType::bf16 ? from_bf16(h) : _mm512_cvtph_ps(h);
}
template <DType D>
HALFBYTE_INLINE void store(void* p, F x) {
  if constexpr (D == DType::f32) {
    _mm512_storeu_ps(p, x);
  } else {
    const __m256i h = D == DType::bf16 ? to_bf16(x) : _mm512_cvtps_ph(x, nearest);
    _mm256_storeu_si256(static_cast<__m256i*>(p), h);
  }
}
template <DType D>
HALFBYTE_INLINE void store_n(void* p, F x, int n) {
  if constexpr (D == DType::f32) {
    _mm512_mask_storeu_ps(p, first(n), x);
  } else {
    _mm256_mask_storeu_epi16(p, first(n), D == DType::bf16 ? to_bf16(x) : _mm512_cvtps_ph(x, nearest));
  }
}

HALFBYTE_INLINE I load_i(const int32_t* p) { return _mm512_loadu_si512(p); }
HALFBYTE_INLINE I load_i16(const int16_t* p) {
  return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
HALFBYTE_INLINE void store_i(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
HALFBYTE_INLINE void store_i_n(int32_t* p, I x, int n) { _mm512_mask_storeu_epi32(p, first(n), x); }
HALFBYTE_INLINE void store_i8(int8_t* p, I x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
HALFBYTE_INLINE void store_i8_n(int8_t* p, I x, int n) { _mm512_mask_cvtepi32_storeu_epi8(p, first(n), x); }
HALFBYTE_INLINE void store_i16(int16_t* p, I x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}
HALFBYTE_INLINE void store_i16_n(int16_t* p, I x, int n) { _mm512_mask_cvtepi32_storeu_epi16(p, first(n), x); }

HALFBYTE_INLINE F set1(float x) { return _mm512_set1_ps(x); }
HALFBYTE_INLINE I set1_i(int32_t x) { return _mm512_set1_epi32(x); }
HALFBYTE_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
HALFBYTE_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
HALFBYTE_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
HALFBYTE_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
HALFBYTE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
HALFBYTE_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
HALFBYTE_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
HALFBYTE_INLINE I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
HALFBYTE_INLINE I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
HALFBYTE_INLINE I mul_i(I a, I b) { return _mm512_mullo_epi32(a, b); }
HALFBYTE_INLINE I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
HALFBYTE_INLINE I and_i(I a, I b) { return _mm512_and_si512(a, b); }
template <int n>
HALFBYTE_INLINE I shift_left(I a) { return _mm512_slli_epi32(a, n); }
template <int n>
HALFBYTE_INLINE I shift_right(I a) { return _mm512_srai_epi32(a, n); }
HALFBYTE_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
HALFBYTE_INLINE I to_int(F a) { return _mm512_cvtps_epi32(a); }
HALFBYTE_INLINE I bits(F a) { return _mm512_castps_si512(a); }
HALFBYTE_INLINE F pow2(I n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}

HALFBYTE_INLINE float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
HALFBYTE_INLINE float reduce_min(F a) { return _mm512_reduce_min_ps(a); }
HALFBYTE_INLINE int32_t reduce_max_i(I a) { return _mm512_reduce_max_epi32(a); }
HALFBYTE_INLINE int32_t reduce_add_i(I a) { return _mm512_reduce_add_epi32(a); }

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
