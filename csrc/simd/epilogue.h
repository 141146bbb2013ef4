// The GEMM epilogue (formula and float order: core/gemm.h) over the vector vocabulary; included by the ISA files after
// their simd header.
#pragma once
#include "core/gemm.h"
#include "simd/math.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

HALFBYTE_INLINE F load_as(DType type, const void* base, int64_t i, int n) {
  const char* p = static_cast<const char*>(base) + i * (type == DType::f32 ? 4 : 2);
  switch (type) {
    case DType::bf16: return load_n<DType::bf16>(p, n);
    case DType::f16: return load_n<DType::f16>(p, n);
    default: return load_n<DType::f32>(p, n);
  }
}

// Columns from `column` on of all rows: `vectors` whole vectors, or n < width columns. Columns before rows, because what
// belongs to a column (scale, sum, bias) stays in registers, and what belongs to a row are three numbers to broadcast.
template <Activation A, DType C, bool grouped, bool has_bias, bool whole, int vectors>
HALFBYTE_INLINE void finish_columns(const EpilogueArgs& e, int column, int n) {
  constexpr int c_bytes = C == DType::f32 ? 4 : 2;
  I b_sum[vectors];
  F b_total[vectors], b_scale[vectors], bias[vectors];
#pragma GCC unroll 2
  for (int v = 0; v < vectors; ++v) {
    const int at = column + v * width;
    if constexpr (grouped) {
      b_total[v] = load<DType::f32>(e.b_total + at);
    } else {
      b_sum[v] = load_i(e.b_sum + at);
    }
    b_scale[v] = load<DType::f32>(e.b_scale + at);
    if constexpr (has_bias) bias[v] = whole ? load<DType::f32>(e.bias + at) : load_n<DType::f32>(e.bias + at, n);
  }
  for (int row = 0; row < e.rows; ++row) {
    I row_sum = set1_i(0), zero = row_sum;
    F scale = set1(0), minus = scale;
    if constexpr (grouped) {
      if (e.a_zero) minus = set1(static_cast<float>(e.a_zero[row]));
      if (e.a_scale) scale = set1(e.a_scale[row]);
    } else {
      row_sum = set1_i(static_cast<int32_t>(static_cast<uint32_t>(e.a_sum[row]) * 128u));
      zero = set1_i(e.a_zero[row]);
      scale = set1(e.a_scale[row]);
    }
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const int at = column + v * width;
      F y;
      if constexpr (grouped) {
        F t = load<DType::f32>(e.t + row * e.acc_stride + at);
        if (e.a_zero) t = sub(t, mul(minus, b_total[v]));
        y = mul(t, b_scale[v]);
        if (e.a_scale) y = mul(y, scale);
      } else {
        I acc = load_i(e.acc + row * e.acc_stride + at);
        acc = sub_i(acc, add_i(row_sum, mul_i(zero, b_sum[v])));
        if constexpr (C == DType::i32) {
          int32_t* c = static_cast<int32_t*>(e.c) + row * e.ldc + at;
          if constexpr (whole) {
            store_i(c, acc);
          } else {
            store_i_n(c, acc, n);
          }
          continue;
        }
        y = mul(mul(to_float(acc), b_scale[v]), scale);
      }
      if constexpr (C != DType::i32) {
        if constexpr (has_bias) y = add(y, bias[v]);
        y = activate<A>(y);
        if (e.factor) y = mul(y, load_n<DType::f32>(e.factor + row * e.factor_stride + at, n));
        if (e.residual) y = add(y, load_as(e.residual_type, e.residual, row * e.ldr + at, n));
        char* c = static_cast<char*>(e.c) + (row * e.ldc + at) * c_bytes;
        if constexpr (whole) {
          store<C>(c, y);
        } else {
          store_n<C>(c, y, n);
        }
      }
    }
  }
}

// Rows a multiple of 4096 bytes apart share the sets of L1: more of them than it has ways, and every line that is written goes
// out before its neighbor comes in. In strips of these many the lines of a row that come next stay.
constexpr int rows_together = 8, many_rows = 16;

template <Activation A, DType C, bool grouped, bool has_bias>
void finish_rows(const EpilogueArgs& args) {
  const EpilogueArgs e = args;  // a copy, or the compiler must think that a store to c changes it
  constexpr int at_once = width == 1 ? 1 : 2;
  int column = 0;
  for (; column + at_once * width <= e.columns; column += at_once * width) {
    finish_columns<A, C, grouped, has_bias, true, at_once>(e, column, width);
  }
  for (; column + width <= e.columns; column += width) finish_columns<A, C, grouped, has_bias, true, 1>(e, column, width);
  if (column < e.columns) finish_columns<A, C, grouped, has_bias, false, 1>(e, column, e.columns - column);
}

template <Activation A, DType C, bool grouped, bool has_bias>
void finish_tile(const EpilogueArgs& args) {
  if (args.rows <= many_rows) return finish_rows<A, C, grouped, has_bias>(args);
  EpilogueArgs e = args;
  const auto bytes_of = [](DType type) { return type == DType::f32 || type == DType::i32 ? 4 : 2; };
  for (int left = args.rows; left > 0; left -= rows_together) {
    e.rows = left < rows_together ? left : rows_together;
    finish_rows<A, C, grouped, has_bias>(e);
    const int64_t sums = rows_together * e.acc_stride;
    e.acc += sums;
    if (e.t) e.t += sums;
    if (e.a_scale) e.a_scale += rows_together;
    if (e.a_zero) e.a_zero += rows_together;
    if (e.a_sum) e.a_sum += rows_together;
    if (e.factor) e.factor += rows_together * e.factor_stride;
    e.c = static_cast<char*>(e.c) + rows_together * e.ldc * bytes_of(e.c_type);
    if (e.residual) e.residual = static_cast<const char*>(e.residual) + rows_together * e.ldr * bytes_of(e.residual_type);
  }
}

template <Activation A, DType C, bool grouped>
void finish(const EpilogueArgs& e) {
  return e.bias ? finish_tile<A, C, grouped, true>(e) : finish_tile<A, C, grouped, false>(e);
}

template <DType C, bool grouped>
void finish_activated(const EpilogueArgs& e) {
  switch (e.activation) {
    case Activation::none: return finish<Activation::none, C, grouped>(e);
    case Activation::relu: return finish<Activation::relu, C, grouped>(e);
    case Activation::gelu: return finish<Activation::gelu, C, grouped>(e);
    case Activation::gelu_tanh: return finish<Activation::gelu_tanh, C, grouped>(e);
    case Activation::silu: return finish<Activation::silu, C, grouped>(e);
  }
}

// Of weights that always are in groups.
void grouped_epilogue(const EpilogueArgs& e) {
  switch (e.c_type) {
    case DType::bf16: return finish_activated<DType::bf16, true>(e);
    case DType::f16: return finish_activated<DType::f16, true>(e);
    default: return finish_activated<DType::f32, true>(e);
  }
}

// Of weights with or without groups.
[[maybe_unused]] void epilogue(const EpilogueArgs& e) {
  if (e.t) return grouped_epilogue(e);
  switch (e.c_type) {
    case DType::f32: return finish_activated<DType::f32, false>(e);
    case DType::bf16: return finish_activated<DType::bf16, false>(e);
    case DType::f16: return finish_activated<DType::f16, false>(e);
    case DType::i32: return finish_tile<Activation::none, DType::i32, false, false>(e);
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
