// The rotation over the vector vocabulary of simd/: a row at a time, whose angles stay in L1 for all of its heads. The
// two conventions differ in where the elements of a pair come from and go to, nothing else. Included by each ISA file
// after its simd header.
#pragma once
#include "ops/rope/op.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

#ifndef HALFBYTE_INLINE
#define HALFBYTE_INLINE inline
#endif

using rope::Args;
using rope::Heads;

template <DType D>
constexpr int64_t size_of = D == DType::f32 ? 4 : 2;

inline int at_most(int n, int limit) { return n < limit ? n : limit; }
inline int not_negative(int n) { return n > 0 ? n : 0; }

// The `n` pairs from i on: n <= width, and a constant of that where it is width.
template <DType D, bool interleaved>
HALFBYTE_INLINE void load_pairs(const char* head, int64_t i, int64_t half, int n, F& a, F& b) {
  if constexpr (interleaved) {
    const char* const p = head + 2 * i * size_of<D>;
    const char* const q = p + width * size_of<D>;
    a = n == width ? load<D>(p) : load_n<D>(p, at_most(2 * n, width));
    b = n == width ? load<D>(q) : load_n<D>(q, not_negative(2 * n - width));
    split_pairs(a, b);
  } else {
    const char* const p = head + i * size_of<D>;
    const char* const q = p + half * size_of<D>;
    a = n == width ? load<D>(p) : load_n<D>(p, n);
    b = n == width ? load<D>(q) : load_n<D>(q, n);
  }
}
template <DType D, bool interleaved>
HALFBYTE_INLINE void store_pairs(char* head, int64_t i, int64_t half, int n, F a, F b) {
  char* p = head + i * size_of<D>;
  char* q = p + half * size_of<D>;
  int n_p = n, n_q = n;
  if constexpr (interleaved) {
    join_pairs(a, b);
    p = head + 2 * i * size_of<D>;
    q = p + width * size_of<D>;
    n_p = at_most(2 * n, width);
    n_q = not_negative(2 * n - width);
  }
  if (n == width) {
    store<D>(p, a);
    store<D>(q, b);
  } else {
    store_n<D>(p, a, n_p);
    store_n<D>(q, b, n_q);
  }
}

template <DType X, DType D, bool interleaved>
HALFBYTE_INLINE void rotate(const char* x, char* out, const float* cos, const float* sin, int64_t i, int64_t half,
                            int n) {
  const F c = n == width ? load<DType::f32>(cos + i) : load_n<DType::f32>(cos + i, n);
  const F s = n == width ? load<DType::f32>(sin + i) : load_n<DType::f32>(sin + i, n);
  F a, b;
  load_pairs<X, interleaved>(x, i, half, n, a, b);
  store_pairs<D, interleaved>(out, i, half, n, sub(mul(a, c), mul(b, s)), add(mul(b, c), mul(a, s)));
}

template <DType X, DType D>
void copy(const char* x, char* out, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + width <= end; i += width) store<D>(out + i * size_of<D>, load<X>(x + i * size_of<X>));
  if (i < end) {
    const int n = static_cast<int>(end - i);
    store_n<D>(out + i * size_of<D>, load_n<X>(x + i * size_of<X>, n), n);
  }
}

template <DType D>
inline char* row_of(const Heads& heads, int64_t batch, int64_t token) {
  return static_cast<char*>(heads.data) + (batch * heads.batch_stride + token * heads.row_stride) * size_of<D>;
}

template <DType X, DType D, bool interleaved>
void rotate_rows(const Args& args, int64_t begin, int64_t end) {
  const int64_t half = args.rotary_dims / 2;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch = row / args.tokens, token = row % args.tokens;
    const int64_t position = args.positions ? args.positions[row] : args.first_position + token;
    const float *const cos = args.cos + position * half, *const sin = args.sin + position * half;
    const char* x = row_of<X>(args.x, batch, token);
    char* out = row_of<D>(args.out, batch, token);
    for (int64_t h = 0; h < args.heads; ++h) {
      int64_t i = 0;
      for (; i + width <= half; i += width) rotate<X, D, interleaved>(x, out, cos, sin, i, half, width);
      if (i < half) rotate<X, D, interleaved>(x, out, cos, sin, i, half, static_cast<int>(half - i));
      if (x != out) copy<X, D>(x, out, args.rotary_dims, args.head_size);
      x += args.x.head_stride * size_of<X>;
      out += args.out.head_stride * size_of<D>;
    }
  }
}

template <DType X, DType D>
void rows_as(const Args& args, int64_t begin, int64_t end) {
  if (args.interleaved) return rotate_rows<X, D, true>(args, begin, end);
  rotate_rows<X, D, false>(args, begin, end);
}
template <DType X>
void rows_from(const Args& args, int64_t begin, int64_t end) {
  switch (args.out.type) {
    case DType::bf16: return rows_as<X, DType::bf16>(args, begin, end);
    case DType::f16: return rows_as<X, DType::f16>(args, begin, end);
    default: return rows_as<X, DType::f32>(args, begin, end);
  }
}

void rows(const Args& args, int64_t begin, int64_t end) {
  switch (args.x.type) {
    case DType::bf16: return rows_from<DType::bf16>(args, begin, end);
    case DType::f16: return rows_from<DType::f16>(args, begin, end);
    default: return rows_from<DType::f32>(args, begin, end);
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
