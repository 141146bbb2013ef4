// The row quantizer over the vector vocabulary of simd/: two passes over a row, range and codes, both on data that
// the first one brought into L1. Included by each ISA file after its simd header.
#pragma once
#include <string.h>

#include "ops/quantize_rows/op.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

using quantize_rows::Args;

#ifndef HALFBYTE_INLINE
#define HALFBYTE_INLINE inline
#endif

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
  constexpr int at_once = 4;  // a minimum waits for the one before it
  F lo[at_once], hi[at_once];
  I magnitude[at_once];
#pragma GCC unroll 4
  for (int j = 0; j < at_once; ++j) lo[j] = set1(0), hi[j] = set1(0), magnitude[j] = set1_i(0);
  const I mask = set1_i(magnitude_mask);
  const auto join = [&](int j, F v) __attribute__((always_inline)) {
    lo[j] = min(v, lo[j]), hi[j] = max(v, hi[j]);
    magnitude[j] = max_i(magnitude[j], and_i(bits(v), mask));
  };
  int64_t i = 0;
  for (; i + at_once * width <= k; i += at_once * width) {
#pragma GCC unroll 4
    for (int j = 0; j < at_once; ++j) join(j, load<D>(element<D>(x, i + j * width)));
  }
  for (; i + width <= k; i += width) join(0, load<D>(element<D>(x, i)));
  if (i < k) join(1, load_n<D>(element<D>(x, i), static_cast<int>(k - i)));
  const auto all = [](auto both, const auto& of) { return both(both(of[0], of[1]), both(of[2], of[3])); };
  return {reduce_min(all([](F p, F q) { return min(p, q); }, lo)), reduce_max(all([](F p, F q) { return max(p, q); }, hi)),
          reduce_max_i(all([](I p, I q) { return max_i(p, q); }, magnitude))};
}

// How codes lie in memory: int8; int16; or 16 bits in two int8, `part` elements apart.
enum class Layout { narrow, wide, split };

template <Layout L>
HALFBYTE_INLINE void store_codes(void* codes, int64_t i, int64_t part, I q, I high) {
  if constexpr (L == Layout::wide) {
    store_i16(static_cast<int16_t*>(codes) + i, q);
  } else if constexpr (L == Layout::narrow) {
    store_i8(static_cast<int8_t*>(codes) + i, q);
  } else {
    store_i8(static_cast<int8_t*>(codes) + i, high);
    store_i8(static_cast<int8_t*>(codes) + part + i, sub_i(q, shift_left<8>(high)));
  }
}
template <Layout L>
HALFBYTE_INLINE void store_codes_n(void* codes, int64_t i, int64_t part, I q, I high, int n) {
  if constexpr (L == Layout::wide) {
    store_i16_n(static_cast<int16_t*>(codes) + i, q, n);
  } else if constexpr (L == Layout::narrow) {
    store_i8_n(static_cast<int8_t*>(codes) + i, q, n);
  } else {
    store_i8_n(static_cast<int8_t*>(codes) + i, high, n);
    store_i8_n(static_cast<int8_t*>(codes) + part + i, sub_i(q, shift_left<8>(high)), n);
  }
}

struct Coded {
  int32_t sum, high_sum, magnitude;
};

struct Grid {
  float scale;
  int32_t zero, lowest, highest;
};

// rint(clamp(x/s, low - z, high - z)) + z equals clip(rint(x/s) + z, low, high): the bounds are integers. in_range: x is finite,
// and x/s + z within the grid but for rounding, as it is where the grid was made for x.
template <DType D, Layout L, bool in_range>
Coded encode(const void* x, int64_t k, void* codes, int64_t part, const Grid& grid) {
  const F scale = set1(1.0f / grid.scale), low = set1(static_cast<float>(grid.lowest - grid.zero));
  const F high = set1(static_cast<float>(grid.highest - grid.zero));
  const I z = set1_i(grid.zero), mask = set1_i(magnitude_mask);
  I sum = set1_i(0), high_sum = set1_i(0), magnitude = set1_i(0), upper = set1_i(0);
  const auto code = [&](F v) __attribute__((always_inline)) {
    magnitude = max_i(magnitude, and_i(bits(v), mask));
    return add_i(to_int(min(max(mul(v, scale), low), high)), z);
  };
  int64_t i = 0;
  if constexpr (L == Layout::narrow) {  // four vectors at once: packing saturates
    for (; i + 4 * width <= k; i += 4 * width) {
      I q[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const F v = load<D>(element<D>(x, i + j * width));
        q[j] = in_range ? add_i(to_int(mul(v, scale)), z) : code(v);
      }
      sum = add_i(sum, pack_i8(static_cast<int8_t*>(codes) + i, q));
    }
  }
  for (; i + width <= k; i += width) {
    const I q = code(load<D>(element<D>(x, i)));
    sum = add_i(sum, q);
    if constexpr (L == Layout::split) {
      upper = shift_right<8>(add_i(q, set1_i(128)));
      high_sum = add_i(high_sum, upper);
    }
    store_codes<L>(codes, i, part, q, upper);
  }
  int32_t tail_sum = 0, tail_high = 0;
  if (i < k) {
    const int n = static_cast<int>(k - i);
    const I q = code(load_n<D>(element<D>(x, i), n));
    int32_t tail[width];
    store_i(tail, q);
    for (int j = 0; j < n; ++j) tail_sum += tail[j], tail_high += (tail[j] + 128) >> 8;
    if constexpr (L == Layout::split) upper = shift_right<8>(add_i(q, set1_i(128)));
    store_codes_n<L>(codes, i, part, q, upper, n);
  }
  return {reduce_add_i(sum) + tail_sum, reduce_add_i(high_sum) + tail_high, reduce_max_i(magnitude)};
}

// The grid of a range, or one with scale 0 for zeros, NaN for what is not finite.
inline Grid grid_of(const Range& range, bool symmetric, int bits) {
  const int32_t highest = bits == 16 ? 32639 : 127;
  if (range.magnitude >= infinity_bits) return {__builtin_nanf(""), 0, 0, 0};
  if (symmetric) {
    const float scale = (range.hi > -range.lo ? range.hi : -range.lo) / static_cast<float>(highest);
    return {scale >= smallest_scale ? scale : 0.0f, 0, -highest, highest};
  }
  const float scale = range.hi / 255.0f - range.lo / 255.0f;
  if (!(scale >= smallest_scale)) return {0.0f, 0, 0, 0};
  const int32_t z = static_cast<int32_t>(__builtin_lrintf(-(range.lo * (1.0f / scale)))) - 128;
  return {scale, z > 127 ? 127 : z, -128, 127};
}

inline bool has_codes(const Grid& grid) { return grid.scale > 0; }  // neither zeros nor NaN
inline float scale_of(const Grid& grid) { return grid.scale == 0 ? 1.0f : grid.scale; }

template <DType D, Layout L>
void quantize_row(const Args& args, int64_t row) {
  constexpr int64_t parts = L == Layout::split ? 2 : 1, code_bytes = L == Layout::wide ? 2 : 1;
  const char* const x = element<D>(args.x, row * args.ldx);
  char* const codes = static_cast<char*>(args.codes) + row * args.ldc * code_bytes;
  const int64_t group = args.group ? args.group : args.k_padded;
  const int64_t groups = args.group ? (args.k_padded + group - 1) / group : 1;
  float* const scales = args.scale + row * (args.scale_per_group ? groups : 1);
  int32_t* const sums = args.sum + row * (groups > 0 ? groups : 1) * parts;

  Grid grid{args.static_scale, args.static_zero, -128, 127};
  if (!args.scale_per_group) {
    if (args.static_scale == 0) grid = grid_of(range_of<D>(x, args.k), args.symmetric, 8);
    scales[0] = scale_of(grid);
    if (args.zero) args.zero[row] = grid.zero;
  }
  sums[0] = 0;
  bool finite = true;
  for (int64_t g = 0, first = 0; g < groups; ++g, first += group) {
    const int64_t padded = group < args.k_padded - first ? group : args.k_padded - first;
    const int64_t left = args.k - first, count = left < 0 ? 0 : left < padded ? left : padded;
    const char* const from = element<D>(x, first);
    char* const to = codes + first * parts * code_bytes;
    if (args.scale_per_group) {
      grid = grid_of(range_of<D>(from, count), true, args.bits);
      scales[g] = scale_of(grid);
    }
    Coded coded{0, 0, 0};
    if (has_codes(grid)) {
      const auto encoder = args.static_scale == 0 ? encode<D, L, L == Layout::narrow> : encode<D, L, false>;
      coded = encoder(from, count, to, padded, grid);
    }
    finite = finite && coded.magnitude < infinity_bits;
    const int64_t filled = has_codes(grid) ? count : 0;
    for (int64_t p = 0; p < parts; ++p) {
      memset(to + (p * padded + filled) * code_bytes, 0, static_cast<size_t>((padded - filled) * code_bytes));
    }
    if constexpr (L == Layout::split) {
      sums[2 * g] = coded.high_sum;
      sums[2 * g + 1] = coded.sum - 256 * coded.high_sum;
    } else {
      sums[g] = coded.sum;
    }
  }
  if (finite) return;
  // Only a static grid meets a NaN or an infinity as late as here.
  scales[0] = __builtin_nanf("");
  if (args.zero) args.zero[row] = 0;
  memset(codes, 0, static_cast<size_t>(args.k_padded * code_bytes));
  for (int64_t g = 0; g < groups; ++g) sums[g] = 0;
}

template <DType D>
void convert_row(const Args& args, int64_t row) {
  const char* const x = element<D>(args.x, row * args.ldx);
  float* const out = static_cast<float*>(args.codes) + row * args.ldc;
  int64_t i = 0;
  for (; i + width <= args.k; i += width) store<DType::f32>(out + i, load<D>(element<D>(x, i)));
  if (i < args.k) {
    const int n = static_cast<int>(args.k - i);
    store_n<DType::f32>(out + i, load_n<D>(element<D>(x, i), n), n);
  }
  memset(out + args.k, 0, static_cast<size_t>(args.k_padded - args.k) * sizeof(float));
}

template <DType D>
void quantize_typed(const Args& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (args.bits == 32) {
      convert_row<D>(args, row);
    } else if (args.wide) {
      quantize_row<D, Layout::wide>(args, row);
    } else if (args.bits == 16) {
      quantize_row<D, Layout::split>(args, row);
    } else {
      quantize_row<D, Layout::narrow>(args, row);
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
