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
HALFBYTE_INLINE I load_i8(const int8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
HALFBYTE_INLINE I load_i8_n(const int8_t* p, int n) { return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)); }
HALFBYTE_INLINE void store_i(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
HALFBYTE_INLINE void store_i_n(int32_t* p, I x, int n) { _mm512_mask_storeu_epi32(p, first(n), x); }
HALFBYTE_INLINE void store_i8(int8_t* p, I x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
HALFBYTE_INLINE I pack_i8(int8_t* p, const I (&x)[4]) {
  const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const I packed = _mm512_packs_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3]));
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, packed));
  const I shifted = _mm512_sad_epu8(_mm512_xor_si512(packed, _mm512_set1_epi8(-128)), _mm512_setzero_si512());
  return _mm512_sub_epi32(shifted, _mm512_set1_epi64(8 * 128));
}
HALFBYTE_INLINE void store_i8_n(int8_t* p, I x, int n) { _mm512_mask_cvtepi32_storeu_epi8(p, first(n), x); }
HALFBYTE_INLINE void store_i16(int16_t* p, I x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}
HALFBYTE_INLINE void store_i16_n(int16_t* p, I x, int n) { _mm512_mask_cvtepi32_storeu_epi16(p, first(n), x); }

HALFBYTE_INLINE F set1(float x) { return _mm512_set1_ps(x); }
HALFBYTE_INLINE I set1_i(int32_t x) { return _mm512_set1_epi32(x); }
// By one load.
HALFBYTE_INLINE void broadcast_each(const float* p, F (&w)[4]) {
  const F four = _mm512_broadcast_f32x4(_mm_loadu_ps(p));
  w[0] = _mm512_permute_ps(four, 0x00);
  w[1] = _mm512_permute_ps(four, 0x55);
  w[2] = _mm512_permute_ps(four, 0xaa);
  w[3] = _mm512_permute_ps(four, 0xff);
}
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
HALFBYTE_INLINE I xor_i(I a, I b) { return _mm512_xor_si512(a, b); }
template <int n>
HALFBYTE_INLINE I shift_left(I a) { return _mm512_slli_epi32(a, n); }
template <int n>
HALFBYTE_INLINE I shift_right(I a) { return _mm512_srai_epi32(a, n); }
HALFBYTE_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
HALFBYTE_INLINE I to_int(F a) { return _mm512_cvtps_epi32(a); }
HALFBYTE_INLINE I bits(F a) { return _mm512_castps_si512(a); }
HALFBYTE_INLINE F from_bits(I a) { return _mm512_castsi512_ps(a); }
HALFBYTE_INLINE F select_greater(F a, F b, F x, F y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
HALFBYTE_INLINE F pow2(I n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}

// Four vectors of four rows each, all of the same four columns -> these columns. Within 128-bit quarters Zen 5 shuffles
// four vectors a cycle, across them two.
HALFBYTE_INLINE void transpose_quarters(const F* u, F* t) {
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(u[0], u[1]));
  const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(u[0], u[1]));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(u[2], u[3]));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(u[2], u[3]));
  t[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
  t[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  t[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
  t[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}
HALFBYTE_INLINE void transpose(F (&t)[16]) {
  F u[16];  // u[4 l + i]: columns 4l .. 4l + 3 of the rows i, i + 4, i + 8 and i + 12
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const F a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    const F c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    u[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    u[4 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
    u[8 + i] = _mm512_shuffle_f32x4(a, c, 0xdd);
    u[12 + i] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
#pragma GCC unroll 4
  for (int l = 0; l < 16; l += 4) transpose_quarters(u + l, t + l);
}
// The eight columns of 16 rows. two(p, q): those of the row at p, then of the row at q. Rows i, i + 4, i + 8 and i + 12
// are addressing modes of one pointer; the empty asm keeps gcc from making a pointer of each.
template <class TwoRows>
HALFBYTE_INLINE void columns_of(const char* p, int64_t row, TwoRows&& two, F (&x)[8]) {
  F u[8];
  const int64_t row4 = 4 * row, row12 = 12 * row;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const F a = two(p, p + row4), b = two(p + 2 * row4, p + row12);
    u[i] = _mm512_shuffle_f32x4(a, b, 0x88);
    u[4 + i] = _mm512_shuffle_f32x4(a, b, 0xdd);
    p += row;
    asm("" : "+r"(p));
  }
  transpose_quarters(u, x);
  transpose_quarters(u + 4, x + 4);
}
template <DType D>
HALFBYTE_INLINE void load_columns(const void* p, int64_t row, F (&x)[8]) {
  const auto two = [](const char* a, const char* b) __attribute__((always_inline)) -> F {
    if constexpr (D == DType::f32) {
      const __m256 low = _mm256_loadu_ps(reinterpret_cast<const float*>(a));
      return _mm512_insertf32x8(_mm512_castps256_ps512(low), _mm256_loadu_ps(reinterpret_cast<const float*>(b)), 1);
    } else {
      const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
      const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
      const __m256i h = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
      return D == DType::bf16 ? from_bf16(h) : _mm512_cvtph_ps(h);
    }
  };
  columns_of(static_cast<const char*>(p), row, two, x);
}
HALFBYTE_INLINE void split_pairs(F& a, F& b) {
  const I even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const F old = a;
  a = _mm512_permutex2var_ps(old, even, b);
  b = _mm512_permutex2var_ps(old, add_i(even, set1_i(1)), b);
}
HALFBYTE_INLINE void join_pairs(F& a, F& b) {
  const I lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const F old = a;
  a = _mm512_permutex2var_ps(old, lower, b);
  b = _mm512_permutex2var_ps(old, add_i(lower, set1_i(8)), b);
}
HALFBYTE_INLINE F keep(F a, int n) { return _mm512_maskz_mov_ps(first(n), a); }
HALFBYTE_INLINE float reduce_add(F a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
HALFBYTE_INLINE float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
HALFBYTE_INLINE float reduce_min(F a) { return _mm512_reduce_min_ps(a); }
HALFBYTE_INLINE int32_t reduce_max_i(I a) { return _mm512_reduce_max_epi32(a); }
HALFBYTE_INLINE int32_t reduce_add_i(I a) { return _mm512_reduce_add_epi32(a); }

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
