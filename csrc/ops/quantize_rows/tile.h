// The row quantizer over the vector vocabulary of simd/: two passes over a row, range and codes, both on data that
// the first one brought into L1. Included by each ISA file after its simd header.
#pragma once
#include <string.h>

#include "ops/quantize_rows/op.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

using quantize_rows::Args;

constexpr float smallest_scale = 0x1p-100f;
constexpr int32_t magnitude_mask = 0x7fffffff, infinity_bits = 0x7f800000;

template <DType D>
inline const char* element(const void* x, int64_t i) {
  return static_cast<const char*>(x) + i * (D == DType::f32 ? 4 : 2);
}

struct Range {
  float lo, hi;       // of the values and zero
  int32_t magnitude;  // bits of max|x|; as integers, NaN > infinity > every number
};

template <DType D>
Range range_of(const void* x, int64_t k) {
  F lo = set1(0), hi = set1(0);
  I magnitude = set1_i(0);
  const I mask = set1_i(magnitude_mask);
  int64_t i = 0;
  for (; i + width <= k; i += width) {
    const F v = load<D>(element<D>(x, i));
    lo = min(v, lo), hi = max(v, hi);
    magnitude = max_i(magnitude, and_i(bits(v), mask));
  }
  if (i < k) {
    const F v = load_n<D>(element<D>(x, i), static_cast<int>(k - i));
    lo = min(v, lo), hi = max(v, hi);
    magnitude = max_i(magnitude, and_i(bits(v), mask));
  }
  return {reduce_min(lo), reduce_max(hi), reduce_max_i(magnitude)};
}

template <class Code>
void store_codes(Code* p, I q) {
  if constexpr (sizeof(Code) == 1) {
    store_i8(p, q);
  } else {
    store_i16(p, q);
  }
}
template <class Code>
void store_codes_n(Code* p, I q, int n) {
  if constexpr (sizeof(Code) == 1) {
    store_i8_n(p, q, n);
  } else {
    store_i16_n(p, q, n);
  }
}

struct Coded {
  int32_t sum, magnitude;
};

// rint(clamp(x/s, low - z, high - z)) + z equals clip(rint(x/s) + z, low, high): the bounds are integers.
template <DType D, class Code>
Coded encode(const void* x, int64_t k, Code* codes, float inverse, int32_t zero, int32_t lowest) {
  const F scale = set1(inverse), low = set1(static_cast<float>(lowest - zero));
  const F high = set1(static_cast<float>(127 - zero));
  const I z = set1_i(zero), mask = set1_i(magnitude_mask);
  I sum = set1_i(0), magnitude = set1_i(0);
  int64_t i = 0;
  for (; i + width <= k; i += width) {
    const F v = load<D>(element<D>(x, i));
    const I q = add_i(to_int(min(max(mul(v, scale), low), high)), z);
    magnitude = max_i(magnitude, and_i(bits(v), mask));
    sum = add_i(sum, q);
    store_codes(codes + i, q);
  }
  int32_t tail_sum = 0;
  if (i < k) {
    const int n = static_cast<int>(k - i);
    const F v = load_n<D>(element<D>(x, i), n);
    const I q = add_i(to_int(min(max(mul(v, scale), low), high)), z);
    magnitude = max_i(magnitude, and_i(bits(v), mask));
    int32_t tail[width];
    store_i(tail, q);
    for (int j = 0; j < n; ++j) tail_sum += tail[j];
    store_codes_n(codes + i, q, n);
  }
  return {reduce_add_i(sum) + tail_sum, reduce_max_i(magnitude)};
}

template <DType D, class Code>
void quantize_row(const Args& args, int64_t row) {
  const char* x = element<D>(args.x, row * args.ldx);
  Code* codes = static_cast<Code*>(args.codes) + row * args.ldc;
  float scale = args.static_scale;
  int32_t zero = args.static_zero;
  bool finite = true, empty = false;
  if (scale == 0) {
    const Range range = range_of<D>(x, args.k);
    finite = range.magnitude < infinity_bits;
    if (args.symmetric) {
      scale = (range.hi > -range.lo ? range.hi : -range.lo) / 127.0f;
      zero = 0;
    } else {
      scale = range.hi / 255.0f - range.lo / 255.0f;
    }
    empty = !(scale >= smallest_scale);
    if (!args.symmetric && !empty) {
      const int32_t z = static_cast<int32_t>(__builtin_lrintf(-(range.lo * (1.0f / scale)))) - 128;
      zero = z > 127 ? 127 : z;
    }
    if (empty) scale = 1, zero = 0;
  }
  Coded coded{0, 0};
  if (finite && !empty) {
    coded = encode<D>(x, args.k, codes, 1.0f / scale, zero, args.symmetric ? -127 : -128);
    finite = coded.magnitude < infinity_bits;
  }
  if (!finite) scale = __builtin_nanf(""), zero = 0, coded.sum = 0;
  const bool blank = !finite || empty;
  const int64_t begin = blank ? 0 : args.k;
  memset(codes + begin, 0, static_cast<size_t>(args.k_padded - begin) * sizeof(Code));
  args.scale[row] = scale;
  args.sum[row] = coded.sum;
  if (args.zero) args.zero[row] = zero;
}

template <DType D>
void quantize_typed(const Args& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (args.wide) {
      quantize_row<D, int16_t>(args, row);
    } else {
      quantize_row<D, int8_t>(args, row);
    }
  }
}

void rows(const Args& args, int64_t begin, int64_t end) {
  switch (args.x_type) {
    case DType::bf16: return quantize_typed<DType::bf16>(args, begin, end);
    case DType::f16: return quantize_typed<DType::f16>(args, begin, end);
    default: return quantize_typed<DType::f32>(args, begin, end);
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
