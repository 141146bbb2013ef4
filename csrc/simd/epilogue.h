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
template <Activation A, DType C, bool grouped, bool whole, bool has_bias>
HALFBYTE_INLINE void finish_columns(const EpilogueArgs& e, int column, int n) {
  I b_sum = set1_i(0);
  F b_total = set1(0);
  if constexpr (grouped) {
    b_total = load<DType::f32>(e.b_total + column);
  } else {
    b_sum = load_i(e.b_sum + column);
  }
  const F b_scale = load<DType::f32>(e.b_scale + column);
  F bias = set1(0);
  if constexpr (has_bias) bias = whole ? load<DType::f32>(e.bias + column) : load_n<DType::f32>(e.bias + column, n);
  for (int row = 0; row < e.rows; ++row) {
    const int64_t at = row * e.ldc + column;
    F y;
    if constexpr (grouped) {
      F t = load<DType::f32>(e.t + row * e.acc_stride + column);
      if (e.a_zero) t = sub(t, mul(set1(static_cast<float>(e.a_zero[row])), b_total));
      y = mul(t, b_scale);
      if (e.a_scale) y = mul(y, set1(e.a_scale[row]));
    } else {
      const I row_sum = set1_i(static_cast<int32_t>(static_cast<uint32_t>(e.a_sum[row]) * 128u));
      I acc = load_i(e.acc + row * e.acc_stride + column);
      acc = sub_i(acc, add_i(row_sum, mul_i(set1_i(e.a_zero[row]), b_sum)));
      if constexpr (C == DType::i32) {
        int32_t* c = static_cast<int32_t*>(e.c) + at;
        if constexpr (whole) {
          store_i(c, acc);
        } else {
          store_i_n(c, acc, n);
        }
        continue;
      }
      y = mul(mul(to_float(acc), b_scale), set1(e.a_scale[row]));
    }
    if constexpr (C != DType::i32) {
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

template <Activation A, DType C, bool grouped, bool has_bias>
void finish_tile(const EpilogueArgs& args) {
  const EpilogueArgs e = args;  // a copy, or the compiler must think that a store to c changes it
  int column = 0;
  for (; column + width <= e.columns; column += width) finish_columns<A, C, grouped, true, has_bias>(e, column, width);
  if (column < e.columns) finish_columns<A, C, grouped, false, has_bias>(e, column, e.columns - column);
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
