// The gathering loop over the vector vocabulary of simd/: a row at a time, group by group, `width` codes at a time.
// Included by each ISA file after its simd header and these functions of its own, with Bytes for `width` bytes:
//
//   Bytes eight_bits(const void* row, int64_t i)  codes i .. i + width - 1 of a row
//   Bytes four_bits(const void* row, int64_t i)   the same of nibbles, 0 .. 15; i is a multiple of width
//   Bytes nf4(Bytes u)                            nf4_levels[u]
//   I widen(Bytes c)                              with their signs
//   float half(const void* p)                     one float16
#pragma once
#include <string.h>

#include "ops/embedding/op.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

using embedding::Args;

enum class Codes { eight_bits, four_bits, nf4 };

template <Codes C>
inline I codes_at(const void* row, int64_t i) {
  if constexpr (C == Codes::eight_bits) {
    return widen(eight_bits(row, i));
  } else if constexpr (C == Codes::four_bits) {
    return widen(four_bits(row, i));
  } else {
    return widen(nf4(four_bits(row, i)));
  }
}

// The last n < width codes of a row, without a look beyond its end.
template <Codes C>
inline I last_codes(const void* row, int64_t i, int n) {
  alignas(16) unsigned char copy[16] = {};
  constexpr int per_byte = C == Codes::eight_bits ? 1 : 2;
  memcpy(copy, static_cast<const char*>(row) + i / per_byte, static_cast<size_t>((n + per_byte - 1) / per_byte));
  return codes_at<C>(copy, 0);
}

inline float number(const void* p, DType type, int64_t i) {
  return type == DType::f32 ? static_cast<const float*>(p)[i] : half(static_cast<const uint16_t*>(p) + i);
}

template <Codes C, DType D>
void gather(const Args& args, int64_t begin, int64_t end) {
  const int64_t k = args.k, group = args.group ? args.group : k, groups = (k + group - 1) / group;
  const int32_t middle = C == Codes::four_bits && !args.minimum ? 8 : 0;  // the zero of codes without one
  constexpr int64_t out_size = D == DType::f32 ? 4 : 2;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t id = args.ids[r];
    const void* row = static_cast<const char*>(args.codes) + id * args.ld;
    char* out = static_cast<char*>(args.out) + r * args.ldo * out_size;
    const F scale = set1(args.scale[id]);
    int64_t i = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = id * groups + g, stop = i + group < k ? i + group : k;
      const I zero = set1_i(args.zero ? args.zero[at] : middle);
      const F group_scale = set1(args.group_scale ? number(args.group_scale, args.group_scale_type, at) : 1.0f);
      const F minimum = set1(args.minimum ? number(args.minimum, args.group_scale_type, at) : 0.0f);
      const auto value = [&](I c) {
        return mul(add(mul(to_float(sub_i(c, zero)), group_scale), minimum), scale);
      };
      for (; i + width <= stop; i += width) store<D>(out + i * out_size, value(codes_at<C>(row, i)));
      if (i < stop) {  // in the last group only
        const int n = static_cast<int>(stop - i);
        store_n<D>(out + i * out_size, value(last_codes<C>(row, i, n)), n);
      }
      i = stop;
    }
  }
}

template <Codes C>
void gather_as(const Args& args, int64_t begin, int64_t end) {
  switch (args.out_type) {
    case DType::bf16: return gather<C, DType::bf16>(args, begin, end);
    case DType::f16: return gather<C, DType::f16>(args, begin, end);
    default: return gather<C, DType::f32>(args, begin, end);
  }
}

void rows(const Args& args, int64_t begin, int64_t end) {
  if (args.bits == 8) return gather_as<Codes::eight_bits>(args, begin, end);
  if (args.nf4) return gather_as<Codes::nf4>(args, begin, end);
  return gather_as<Codes::four_bits>(args, begin, end);
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
