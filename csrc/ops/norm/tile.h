// The normalizer over the vector vocabulary of simd/: passes over one row at a time, which the first one brings into
// L1. Included by each ISA file after its simd header.
//
//   read     x (+ residual) -> h float32 in memory, where x is not that already, and its sum or sum of squares
//   spread   sum of (h - mean)^2, layer only
//   write    h -> y
//
// then the row quantizer on y. h lies in x, in sum_out or in the scratch row; y in the output or, where codes are made
// of it and the output is not float32, in the scratch row.
#pragma once
#include "ops/norm/op.h"
#include "ops/quantize_rows/tile.h"
#include "simd/sum16.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

using norm::Kind;

template <DType D>
inline char* element(void* x, int64_t i) {
  return static_cast<char*>(x) + i * (D == DType::f32 ? 4 : 2);
}

struct Read {
  const float* h;
  float total;  // sum of h, or of h^2
};

// h, which x is where it is float32 and neither a residual nor a sum is wanted: stored false.
template <Kind kind, DType X, bool has_residual, DType R, bool stored>
Read read_row(const norm::Args& args, int64_t row) {
  const char* const x = element<X>(args.x, row * args.ldx);
  const char* const residual = has_residual ? element<R>(args.residual, row * args.ldr) : nullptr;
  float* h = args.scratch;
  if (args.sum_out && args.sum_type == DType::f32) h = static_cast<float*>(args.sum_out) + row * args.lds;
  Sum16 sum;
  sum.clear();
  const auto join = [&](int v, F value) {
    if constexpr (kind == Kind::layer) {
      sum.add(v, value);
    } else {
      sum.add_product(v, value, value);
    }
  };
  each_vector(
      args.k,
      [&](int v, int64_t i) {
        F value = load<X>(element<X>(x, i));
        if constexpr (has_residual) value = add(value, load<R>(element<R>(residual, i)));
        if constexpr (stored) store<DType::f32>(h + i, value);
        join(v, value);
      },
      [&](int v, int64_t i, int n) {
        F value = load_n<X>(element<X>(x, i), n);
        if constexpr (has_residual) value = add(value, load_n<R>(element<R>(residual, i), n));
        if constexpr (stored) store_n<DType::f32>(h + i, value, n);
        join(v, value);
      });
  return {stored ? h : reinterpret_cast<const float*>(x), sum.total()};
}

// The sum of (h - mean)^2.
float spread_of(const float* h, int64_t k, float mean) {
  const F m = set1(mean);
  Sum16 sum;
  sum.clear();
  each_vector(
      k,
      [&](int v, int64_t i) {
        const F d = sub(load<DType::f32>(h + i), m);
        sum.add_product(v, d, d);
      },
      [&](int v, int64_t i, int n) {
        const F d = keep(sub(load_n<DType::f32>(h + i, n), m), n);
        sum.add_product(v, d, d);
      });
  return sum.total();
}

template <Kind kind, DType D, bool has_weight, bool has_bias>
void write_row(const norm::Args& args, const float* h, float mean, float inverse, void* out) {
  const float *const weight = args.weight, *const bias = args.bias;
  const F m = set1(mean), r = set1(inverse);
  const auto value = [&](F x, F w, F b) {
    if constexpr (kind == Kind::layer) x = sub(x, m);
    x = mul(x, r);
    if constexpr (has_weight && has_bias) return fma(x, w, b);
    if constexpr (has_weight) return mul(x, w);
    if constexpr (has_bias) return add(x, b);
    return x;
  };
  int64_t i = 0;
  for (; i + width <= args.k; i += width) {
    const F w = has_weight ? load<DType::f32>(weight + i) : r, b = has_bias ? load<DType::f32>(bias + i) : r;
    store<D>(element<D>(out, i), value(load<DType::f32>(h + i), w, b));
  }
  if (i < args.k) {
    const int n = static_cast<int>(args.k - i);
    const F w = has_weight ? load_n<DType::f32>(weight + i, n) : r, b = has_bias ? load_n<DType::f32>(bias + i, n) : r;
    store_n<D>(element<D>(out, i), value(load_n<DType::f32>(h + i, n), w, b), n);
  }
}

template <DType D>
void round_row(const float* from, int64_t k, void* out) {
  int64_t i = 0;
  for (; i + width <= k; i += width) store<D>(element<D>(out, i), load<DType::f32>(from + i));
  if (i < k) {
    const int n = static_cast<int>(k - i);
    store_n<D>(element<D>(out, i), load_n<DType::f32>(from + i, n), n);
  }
}

// To row `row` of a matrix of 16-bit floats.
void round_to(DType type, void* matrix, int64_t ld, int64_t row, const float* from, int64_t k) {
  if (type == DType::bf16) return round_row<DType::bf16>(from, k, element<DType::bf16>(matrix, row * ld));
  round_row<DType::f16>(from, k, element<DType::f16>(matrix, row * ld));
}

using Reader = Read (*)(const norm::Args& args, int64_t row);
using Writer = void (*)(const norm::Args& args, const float* h, float mean, float inverse, void* out);

template <Kind kind, DType X>
Reader reader_of(const norm::Args& args) {
  if (!args.residual) {
    if (X == DType::f32 && !args.sum_out) return read_row<kind, X, false, X, X != DType::f32>;
    return read_row<kind, X, false, X, true>;
  }
  switch (args.residual_type) {
    case DType::bf16: return read_row<kind, X, true, DType::bf16, true>;
    case DType::f16: return read_row<kind, X, true, DType::f16, true>;
    default: return read_row<kind, X, true, DType::f32, true>;
  }
}
template <Kind kind>
Reader reader_of(const norm::Args& args) {
  switch (args.x_type) {
    case DType::bf16: return reader_of<kind, DType::bf16>(args);
    case DType::f16: return reader_of<kind, DType::f16>(args);
    default: return reader_of<kind, DType::f32>(args);
  }
}

template <Kind kind, DType D>
Writer writer_of(const norm::Args& args) {
  if constexpr (kind == Kind::layer) {
    if (args.bias) return args.weight ? write_row<kind, D, true, true> : write_row<kind, D, false, true>;
  }
  return args.weight ? write_row<kind, D, true, false> : write_row<kind, D, false, false>;
}
template <Kind kind>
Writer writer_of(const norm::Args& args, DType type) {
  switch (type) {
    case DType::bf16: return writer_of<kind, DType::bf16>(args);
    case DType::f16: return writer_of<kind, DType::f16>(args);
    default: return writer_of<kind, DType::f32>(args);
  }
}

template <Kind kind>
void normalize(const norm::Args& args, int64_t begin, int64_t end) {
  const float k = static_cast<float>(args.k);
  const bool rounds_sum = args.sum_out && args.sum_type != DType::f32;
  const bool writes = args.out || args.codes;
  const bool via_scratch = args.codes && !(args.out && args.out_type == DType::f32);
  const Reader read = reader_of<kind>(args);
  const Writer write = writer_of<kind>(args, via_scratch ? DType::f32 : args.out_type);
  const int64_t out_stride = args.ldo * (args.out_type == DType::f32 ? 4 : 2);
  quantize_rows::Args codes{};
  if (args.codes) {
    codes = *args.codes;
    codes.x = via_scratch ? args.scratch : args.out;
    codes.ldx = via_scratch ? 0 : args.ldo;
    codes.x_type = DType::f32;
    codes.k = args.k;
  }
  for (int64_t row = begin; row < end; ++row) {
    const Read in = read(args, row);
    if (rounds_sum) round_to(args.sum_type, args.sum_out, args.lds, row, in.h, args.k);
    if (!writes) continue;
    float mean = 0, squares = in.total;
    if constexpr (kind == Kind::layer) {
      mean = in.total / k;
      squares = spread_of(in.h, args.k, mean);
    }
    const float inverse = 1.0f / __builtin_sqrtf(squares / k + args.eps);
    void* const y = via_scratch ? static_cast<void*>(args.scratch) : static_cast<char*>(args.out) + row * out_stride;
    write(args, in.h, mean, inverse, y);
    if (!args.codes) continue;
    if (args.out && via_scratch) round_to(args.out_type, args.out, args.ldo, row, args.scratch, args.k);
    rows(codes, row, row + 1);
  }
}

void norm_rows(const norm::Args& args, int64_t begin, int64_t end) {
  if (args.kind == Kind::layer) {
    normalize<Kind::layer>(args, begin, end);
  } else {
    normalize<Kind::rms>(args, begin, end);
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
