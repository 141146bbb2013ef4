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

// Columns column .. column+n-1 of all rows, n <= width. Column by column, because what belongs to a column (scale, sum,
// bias) are three vectors that stay in registers, and what belongs to a row are three numbers to broadcast.
template <Activation A, DType C, bool whole, bool has_bias>
HALFBYTE_INLINE void finish_columns(const EpilogueArgs& e, int column, int n) {
  const I b_sum = load_i(e.b_sum + column);
  const F b_scale = load<DType::f32>(e.b_scale + column);
  F bias = set1(0);
  if constexpr (has_bias) bias = whole ? load<DType::f32>(e.bias + column) : load_n<DType::f32>(e.bias + column, n);
  for (int row = 0; row < e.rows; ++row) {
    const I row_sum = set1_i(static_cast<int32_t>(static_cast<uint32_t>(e.a_sum[row]) * 128u));
    I acc = load_i(e.acc + row * e.acc_stride + column);
    acc = sub_i(acc, add_i(row_sum, mul_i(set1_i(e.a_zero[row]), b_sum)));
    const int64_t at = row * e.ldc + column;
    if constexpr (C == DType::i32) {
      int32_t* c = static_cast<int32_t*>(e.c) + at;
      if constexpr (whole) {
        store_i(c, acc);
      } else {
        store_i_n(c, acc, n);
      }
    } else {
      F y = mul(mul(to_float(acc), b_scale), set1(e.a_scale[row]));
      if constexpr (has_bias) y = add(y, bias);
      y = activate<A>(y);
      if (e.residual) y = add(y, load_as(e.residual_type, e.residual, row * e.ldr + column, n));
      char* c = static_cast<char*>(e.c) + at * (C == DType::f32 ? 4 : 2);
      if constexpr (whole) {
        store<C>(c, y);
      } else {
        store_n<C>(c, y, n);
      }
    }
  }
}

template <Activation A, DType C, bool has_bias>
void finish_tile(const EpilogueArgs& args) {
  const EpilogueArgs e = args;  // a copy, or the compiler must think that a store to c changes it
  int column = 0;
  for (; column + width <= e.columns; column += width) finish_columns<A, C, true, has_bias>(e, column, width);
  if (column < e.columns) finish_columns<A, C, false, has_bias>(e, column, e.columns - column);
}

template <Activation A, DType C>
void finish(const EpilogueArgs& e) {
  return e.bias ? finish_tile<A, C, true>(e) : finish_tile<A, C, false>(e);
}

template <DType C>
void finish_activated(const EpilogueArgs& e) {
  switch (e.activation) {
    case Activation::none: return finish<Activation::none, C>(e);
    case Activation::relu: return finish<Activation::relu, C>(e);
    case Activation::gelu: return finish<Activation::gelu, C>(e);
    case Activation::gelu_tanh: return finish<Activation::gelu_tanh, C>(e);
    case Activation::silu: return finish<Activation::silu, C>(e);
  }
}

void epilogue(const EpilogueArgs& e) {
  switch (e.c_type) {
    case DType::f32: return finish_activated<DType::f32>(e);
    case DType::bf16: return finish_activated<DType::bf16>(e);
    case DType::f16: return finish_activated<DType::f16>(e);
    case DType::i32: return finish_tile<Activation::none, DType::i32, false>(e);
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
