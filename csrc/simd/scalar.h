// Vector vocabulary of the scalar kernels: vectors of one element. The formulas in the ops' tile.h files are written
// once over this vocabulary, with the same operations in the same order for every instruction set, so that results
// are equal bit for bit.
//
//   F, I          vector of float32, of int32; width elements each
//   load<D>, store<D>, *_n    from and to memory in storage type D (f32, bf16, f16), the *_n forms for n < width
//   max(a, b)     a > b ? a : b, like the x86 instruction: b when either is NaN
//   to_int        rounds half to even
//   keep(a, n)    the first n elements of a, 0 in the place of the others; n = 0 .. width
//   pack_i8(p, x)  four vectors, saturated, to int8; returns a vector whose elements add up to their sum
//   split_pairs(a, b)   a, b = 2 width elements in a row -> the even ones, the odd ones; join_pairs is the inverse
//   select_greater(a, b, x, y)  a > b ? x : y
//   transpose(t)                columns of a square of width vectors
//   broadcast_each(p, w)        w[i] = p[i] in all elements, i = 0 .. 3
//   load_columns<D>(p, row, x)  columns 0 .. 7 of `width` rows that lie `row` bytes apart
//   reduce_add(a) adds the halves of a, a[j] + a[j + width/2], then the halves of that, until one number is left
#pragma once
#include <cmath>
#include <cstring>

#include "core/kernel.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

using F = float;
using I = int32_t;
constexpr int width = 1;

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float from_bf16(uint16_t h) { return float_of(uint32_t{h} << 16); }
inline uint16_t to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);  // NaN stays NaN, quiet
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// float16 by scaling: 2^112 moves the 5-bit exponent range onto the 8-bit one, subnormals included.
inline float from_f16(uint16_t h) {
  const uint32_t magnitude = (h & 0x7fffu) << 13;
  const uint32_t sign = uint32_t{h & 0x8000u} << 16;
  if (magnitude >= 0x0f800000u) return float_of(sign | magnitude | 0x70000000u);  // Inf, NaN
  return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}
inline uint16_t to_f16(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to Inf from 65520 on
  if (a < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return static_cast<uint16_t>(sign | (bits_of(float_of(a) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfff + ((a >> 13) & 1)) >> 13));
}

template <DType D>
inline F load(const void* p) {
  if constexpr (D == DType::f32) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
  } else {
    uint16_t h;
    std::memcpy(&h, p, 2);
    return D == DType::bf16 ? from_bf16(h) : from_f16(h);
  }
}
template <DType D>
inline void store(void* p, F x) {
  if constexpr (D == DType::f32) {
    std::memcpy(p, &x, 4);
  } else {
    const uint16_t h = D == DType::bf16 ? to_bf16(x) : to_f16(x);
    std::memcpy(p, &h, 2);
  }
}
template <DType D>
inline F load_n(const void* p, int) { return load<D>(p); }
template <DType D>
inline void store_n(void* p, F x, int) { store<D>(p, x); }

inline I load_i(const int32_t* p) { return *p; }
inline I load_i16(const int16_t* p) { return *p; }
inline I load_i8(const int8_t* p) { return *p; }
inline I load_i8_n(const int8_t* p, int) { return *p; }
inline void store_i(int32_t* p, I x) { *p = x; }
inline void store_i_n(int32_t* p, I x, int) { *p = x; }
inline void store_i8(int8_t* p, I x) { *p = static_cast<int8_t>(x); }
inline I pack_i8(int8_t* p, const I (&x)[4]) {
  I sum = 0;
  for (int j = 0; j < 4; ++j) {
    p[j] = static_cast<int8_t>(x[j] < -128 ? -128 : x[j] > 127 ? 127 : x[j]);
    sum += p[j];
  }
  return sum;
}
inline void store_i8_n(int8_t* p, I x, int) { *p = static_cast<int8_t>(x); }
inline void store_i16(int16_t* p, I x) { *p = static_cast<int16_t>(x); }
inline void store_i16_n(int16_t* p, I x, int) { *p = static_cast<int16_t>(x); }

inline F set1(float x) { return x; }
inline I set1_i(int32_t x) { return x; }
inline void broadcast_each(const float* p, F (&w)[4]) { std::memcpy(w, p, sizeof w); }
inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F fma(F a, F b, F c) { return std::fma(a, b, c); }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
// Integer arithmetic wraps, as the vector instructions do.
inline I add_i(I a, I b) { return static_cast<I>(uint32_t(a) + uint32_t(b)); }
inline I sub_i(I a, I b) { return static_cast<I>(uint32_t(a) - uint32_t(b)); }
inline I mul_i(I a, I b) { return static_cast<I>(uint32_t(a) * uint32_t(b)); }
inline I max_i(I a, I b) { return a > b ? a : b; }
inline I and_i(I a, I b) { return a & b; }
inline I xor_i(I a, I b) { return a ^ b; }
template <int n>
inline I shift_left(I a) { return static_cast<I>(uint32_t(a) << n); }
template <int n>
inline I shift_right(I a) { return a >> n; }  // arithmetic
inline F to_float(I a) { return static_cast<float>(a); }
inline I to_int(F a) { return static_cast<I>(std::lrintf(a)); }
inline I bits(F a) { return static_cast<I>(bits_of(a)); }
inline F from_bits(I a) { return float_of(static_cast<uint32_t>(a)); }
inline F select_greater(F a, F b, F x, F y) { return a > b ? x : y; }
inline F pow2(I n) { return float_of(static_cast<uint32_t>(n + 127) << 23); }

inline void transpose(F (&)[1]) {}
template <DType D>
inline void load_columns(const void* p, int64_t, F (&x)[8]) {
  for (int c = 0; c < 8; ++c) x[c] = load<D>(static_cast<const char*>(p) + c * (D == DType::f32 ? 4 : 2));
}
inline void split_pairs(F&, F&) {}
inline void join_pairs(F&, F&) {}
inline F keep(F a, int n) { return n > 0 ? a : 0.0f; }
inline float reduce_add(F a) { return a; }
inline float reduce_max(F a) { return a; }
inline float reduce_min(F a) { return a; }
inline int32_t reduce_max_i(I a) { return a; }
inline int32_t reduce_add_i(I a) { return a; }

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
