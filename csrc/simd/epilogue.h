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

// Columns column .. column+n-1 of one row, n <= width.
template <Activation A, DType C, bool whole>
HALFBYTE_INLINE void finish(const EpilogueArgs& e, int row, int column, int n, I row_sum, I zero, F a_scale) {
  I acc = load_i(e.acc + row * e.acc_stride + column);
  acc = sub_i(acc, add_i(row_sum, mul_i(zero, load_i(e.b_sum + column))));
  const int64_t at = row * e.ldc + column;
  if constexpr (C == DType::i32) {
    int32_t* c = static_cast<int32_t*>(e.c) + at;
    if constexpr (whole) {
      store_i(c, acc);
    } else {
      store_i_n(c, acc, n);
    }
  } else {
    F y = mul(mul(to_float(acc), load<DType::f32>(e.b_scale + column)), a_scale);
    if (e.bias) {
      y = add(y, whole ? load<DType::f32>(e.bias + column) : load_n<DType::f32>(e.bias + column, n));
    }
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

// The arguments are copied: the compiler must not think that a store to c changes them and load them for every vector.
template <Activation A, DType C>
void finish_rows(const EpilogueArgs& args) {
  const EpilogueArgs e = args;
  for (int row = 0; row < e.rows; ++row) {
    const I row_sum = set1_i(static_cast<int32_t>(static_cast<uint32_t>(e.a_sum[row]) * 128u));
    const I zero = set1_i(e.a_zero[row]);
    const F a_scale = set1(e.a_scale[row]);
    int column = 0;
    for (; column + width <= e.columns; column += width) {
      finish<A, C, true>(e, row, column, width, row_sum, zero, a_scale);
    }
    if (column < e.columns) finish<A, C, false>(e, row, column, e.columns - column, row_sum, zero, a_scale);
  }
}

template <DType C>
void finish_activated(const EpilogueArgs& e) {
  switch (e.activation) {
    case Activation::none: return finish_rows<Activation::none, C>(e);
    case Activation::relu: return finish_rows<Activation::relu, C>(e);
    case Activation::gelu: return finish_rows<Activation::gelu, C>(e);
    case Activation::gelu_tanh: return finish_rows<Activation::gelu_tanh, C>(e);
    case Activation::silu: return finish_rows<Activation::silu, C>(e);
  }
}

void epilogue(const EpilogueArgs& e) {
  switch (e.c_type) {
    case DType::f32: return finish_activated<DType::f32>(e);
    case DType::bf16: return finish_activated<DType::bf16>(e);
    case DType::f16: return finish_activated<DType::f16>(e);
    case DType::i32: return finish_rows<Activation::none, DType::i32>(e);
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
