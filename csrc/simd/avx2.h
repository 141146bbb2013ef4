// Vector vocabulary (see simd/scalar.h) on 256-bit registers: AVX2, FMA, F16C, BMI.
#pragma once
#include <immintrin.h>

#include "core/kernel.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

#define HALFBYTE_INLINE inline __attribute__((always_inline))

using F = __m256;
using I = __m256i;
constexpr int width = 8;

HALFBYTE_INLINE I first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// 16- and 8-bit elements have no masked access in AVX2: the tail goes through a copy of n elements.
template <class T>
HALFBYTE_INLINE __m128i load_small_n(const void* p, int n) {
  alignas(16) T copy[16 / sizeof(T)] = {};
  __builtin_memcpy(copy, p, static_cast<size_t>(n) * sizeof(T));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(copy));
}
template <class T>
HALFBYTE_INLINE void store_small_n(void* p, __m128i x, int n) {
  alignas(16) T copy[16 / sizeof(T)];
  _mm_store_si128(reinterpret_cast<__m128i*>(copy), x);
  __builtin_memcpy(p, copy, static_cast<size_t>(n) * sizeof(T));
}

HALFBYTE_INLINE F from_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
// Eight int32 that fit into 16 bits -> eight 16-bit numbers (packs works per 128-bit half, the permute joins them).
HALFBYTE_INLINE __m128i narrow_u16(I x) {
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x08));
}
HALFBYTE_INLINE __m128i narrow_i16(I x) {
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packs_epi32(x, x), 0x08));
}
HALFBYTE_INLINE __m128i narrow_i8(I x) {
  const __m128i words = narrow_i16(x);
  return _mm_packs_epi16(words, words);
}
// Round to nearest even by integer arithmetic; NaN keeps its upper half with the quiet bit set.
HALFBYTE_INLINE __m128i to_bf16(F x) {
  const I u = _mm256_castps_si256(x);
  const I high = _mm256_srli_epi32(u, 16);
  const I odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const I rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff)), 16);
  const I quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const I nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return narrow_u16(_mm256_blendv_epi8(rounded, quiet, nan));
}
constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

template <DType D>
HALFBYTE_INLINE F load(const void* p) {
  if constexpr (D == DType::f32) return _mm256_loadu_ps(static_cast<const float*>(p));
  const __m128i h = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return D == DType::bf16 ? from_bf16(h) : _mm256_cvtph_ps(h);
}
template <DType D>
HALFBYTE_INLINE F load_n(const void* p, int n) {
  if constexpr (D == DType::f32) return _mm256_maskload_ps(static_cast<const float*>(p), first(n));
  const __m128i h = load_small_n<uint16_t>(p, n);
  return D == DType::bf16 ? from_bf16(h) : _mm256_cvtph_ps(h);
}
template <DType D>
HALFBYTE_INLINE void store(void* p, F x) {
  if constexpr (D == DType::f32) {
    _mm256_storeu_ps(static_cast<float*>(p), x);
  } else {
    _mm_storeu_si128(static_cast<__m128i*>(p), D == DType::bf16 ? to_bf16(x) : _mm256_cvtps_ph(x, nearest));
  }
}
template <DType D>
HALFBYTE_INLINE void store_n(void* p, F x, int n) {
  if constexpr (D == DType::f32) {
    _mm256_maskstore_ps(static_cast<float*>(p), first(n), x);
  } else {
    store_small_n<uint16_t>(p, D == DType::bf16 ? to_bf16(x) : _mm256_cvtps_ph(x, nearest), n);
  }
}

HALFBYTE_INLINE I load_i(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
HALFBYTE_INLINE I load_i16(const int16_t* p) {
  return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
HALFBYTE_INLINE I load_i8(const int8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
HALFBYTE_INLINE I load_i8_n(const int8_t* p, int n) { return _mm256_cvtepi8_epi32(load_small_n<int8_t>(p, n)); }
HALFBYTE_INLINE void store_i(int32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
HALFBYTE_INLINE void store_i_n(int32_t* p, I x, int n) { _mm256_maskstore_epi32(p, first(n), x); }
HALFBYTE_INLINE void store_i8(int8_t* p, I x) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), narrow_i8(x)); }
HALFBYTE_INLINE I pack_i8(int8_t* p, const I (&x)[4]) {
  const I packed = _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
  const I ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), ordered);
  const I shifted = _mm256_sad_epu8(_mm256_xor_si256(packed, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
  return _mm256_sub_epi32(shifted, _mm256_set1_epi64x(8 * 128));
}
HALFBYTE_INLINE void store_i8_n(int8_t* p, I x, int n) { store_small_n<int8_t>(p, narrow_i8(x), n); }
HALFBYTE_INLINE void store_i16(int16_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_i16(x)); }
HALFBYTE_INLINE void store_i16_n(int16_t* p, I x, int n) { store_small_n<int16_t>(p, narrow_i16(x), n); }

HALFBYTE_INLINE F set1(float x) { return _mm256_set1_ps(x); }
HALFBYTE_INLINE I set1_i(int32_t x) { return _mm256_set1_epi32(x); }
// By one load.
HALFBYTE_INLINE void broadcast_each(const float* p, F (&w)[4]) {
  const F four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
  w[0] = _mm256_permute_ps(four, 0x00);
  w[1] = _mm256_permute_ps(four, 0x55);
  w[2] = _mm256_permute_ps(four, 0xaa);
  w[3] = _mm256_permute_ps(four, 0xff);
}
HALFBYTE_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
HALFBYTE_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
HALFBYTE_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
HALFBYTE_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
HALFBYTE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
HALFBYTE_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
HALFBYTE_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
HALFBYTE_INLINE I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
HALFBYTE_INLINE I sub_i(I a, I b) { return _mm256_sub_epi32(a, b); }
HALFBYTE_INLINE I mul_i(I a, I b) { return _mm256_mullo_epi32(a, b); }
HALFBYTE_INLINE I max_i(I a, I b) { return _mm256_max_epi32(a, b); }
HALFBYTE_INLINE I and_i(I a, I b) { return _mm256_and_si256(a, b); }
HALFBYTE_INLINE I xor_i(I a, I b) { return _mm256_xor_si256(a, b); }
template <int n>
HALFBYTE_INLINE I shift_left(I a) { return _mm256_slli_epi32(a, n); }
template <int n>
HALFBYTE_INLINE I shift_right(I a) { return _mm256_srai_epi32(a, n); }
HALFBYTE_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }
HALFBYTE_INLINE I to_int(F a) { return _mm256_cvtps_epi32(a); }
HALFBYTE_INLINE I bits(F a) { return _mm256_castps_si256(a); }
HALFBYTE_INLINE F from_bits(I a) { return _mm256_castsi256_ps(a); }
HALFBYTE_INLINE F select_greater(F a, F b, F x, F y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
HALFBYTE_INLINE F pow2(I n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

HALFBYTE_INLINE void transpose(F (&t)[8]) {
  F u[8];  // u[4 h + i]: columns 4h .. 4h + 3 of the rows i and i + 4
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    u[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    u[4 + i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
#pragma GCC unroll 2
  for (int h = 0; h < 8; h += 4) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(u[h], u[h + 1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(u[h], u[h + 1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(u[h + 2], u[h + 3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(u[h + 2], u[h + 3]));
    t[h] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    t[h + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    t[h + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    t[h + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
}
template <DType D>
HALFBYTE_INLINE void load_columns(const void* p, int64_t row, F (&x)[8]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) x[i] = load<D>(static_cast<const char*>(p) + i * row);
  transpose(x);
}
// Shuffles and unpacks work per 128-bit half: the permutes put the halves where the elements belong.
HALFBYTE_INLINE void split_pairs(F& a, F& b) {
  const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));  // pairs of lanes: a0 a2, b0 b2, a4 a6, b4 b6
  const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
  a = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8));
  b = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
}
HALFBYTE_INLINE void join_pairs(F& a, F& b) {
  const F low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
  a = _mm256_permute2f128_ps(low, high, 0x20);
  b = _mm256_permute2f128_ps(low, high, 0x31);
}
HALFBYTE_INLINE F keep(F a, int n) { return _mm256_and_ps(a, _mm256_castsi256_ps(first(n))); }
HALFBYTE_INLINE float reduce_add(F a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
HALFBYTE_INLINE float reduce_max(F a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
HALFBYTE_INLINE float reduce_min(F a) {
  __m128 x = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_min_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_min_ss(x, _mm_movehdup_ps(x)));
}
HALFBYTE_INLINE int32_t reduce_max_i(I a) {
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
HALFBYTE_INLINE int32_t reduce_add_i(I a) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
