// What both ways of attention share: the rows of a task and the keys they see, masks as vectors of numbers, keys and
// values as float32, and the power of two.
#pragma once
#include <string.h>

#include "ops/attention/op.h"
#include "simd/sum16.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

using attention::Args;
using attention::key_block;
using attention::Mask;
using attention::Storage;

constexpr float lowest = -0x1.fffffep127f, infinity = __builtin_inff();
constexpr float log2_e = 1.44269504f;

inline int64_t padded(int64_t head_size) { return (head_size + 15) / 16 * 16; }
inline float query_factor(const Args& a) { return static_cast<float>(a.scale * 1.4426950408889634); }

// 2^x for x <= 0. Adding 1.5 * 2^23 rounds to an integer n in the low bits; with 127 more those are the exponent of
// 2^n, or of 0 where n = -127. The polynomial is fitted on |r| <= 1/2 for the relative error, p(0) = 1 being exact: it
// is 9e-8, with the roundings 1.7e-7.
HALFBYTE_INLINE F power_of_2(F x) {
  const F magic = set1(0x1.8p23f + 127.0f);
  x = max(set1(-127.0f), x);
  const F n = add(x, magic);
  const F r = sub(x, sub(n, magic));
  F p = set1(0.001326472731307149f);
  p = fma(p, r, set1(0.009671512991189957f));
  p = fma(p, r, set1(0.05550733581185341f));
  p = fma(p, r, set1(0.24022242426872253f));
  p = fma(p, r, set1(0.6931470036506653f));
  p = fma(p, r, set1(1.0f));
  return mul(p, from_bits(shift_left<23>(bits(n))));
}

// A bias of -inf rules a key out, whatever its score.
HALFBYTE_INLINE F biased(F score, F bias) { return select_greater(bias, set1(-infinity), add(score, bias), bias); }

// ---------------------------------------------------------------- rows

struct Rows {
  int64_t batch, first;  // rows first .. first + count - 1 of queries x group
  int count, kv_head, group;
  int64_t first_query() const { return first / group; }
  int64_t last_query() const { return (first + count - 1) / group; }
};

// The rows one after another.
class Walk {
 public:
  explicit Walk(const Rows& rows)
      : query(rows.first / rows.group), member_(static_cast<int>(rows.first % rows.group)), rows_(rows) {}
  int head() const { return rows_.kv_head * rows_.group + member_; }
  void next() {
    if (++member_ == rows_.group) member_ = 0, ++query;
  }
  int64_t query;

 private:
  int member_;
  const Rows& rows_;
};

inline int64_t q_at(const Args& a, const Rows& rows, const Walk& row) {
  return rows.batch * a.q_batch + row.query * a.q_row + row.head() * a.q_head;
}
inline int64_t out_at(const Args& a, const Rows& rows, const Walk& row) {
  return rows.batch * a.out_batch + row.query * a.out_row + row.head() * a.out_head;
}
inline int64_t mask_at(const Args& a, const Rows& rows, const Walk& row) {
  return rows.batch * a.mask_batch + row.head() * a.mask_head + row.query * a.mask_row;
}

// 1 / l, 0 where no key was seen, NaN of NaN.
HALFBYTE_INLINE F inverse_of(F l) { return select_greater(l, set1(0), div(set1(1), l), l); }

// ---------------------------------------------------------------- keys

struct Range {
  int64_t begin, end;
};

inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// The keys of [first, first + count) that position rules in for one query, counted from `first`.
inline Range seen_by(const Args& a, int64_t query, int64_t first, int64_t count) {
  const int64_t own = query + a.offset - first;
  const int64_t end = a.causal ? clamp(own + 1, 0, count) : count;
  return {a.window ? clamp(own + 1 - a.window, 0, end) : 0, end};
}

// Those that any row sees; begins with a whole block.
inline Range seen_by(const Args& a, const Rows& rows) {
  const int64_t begin = seen_by(a, rows.first_query(), 0, a.keys).begin;
  return {begin / key_block * key_block, seen_by(a, rows.last_query(), 0, a.keys).end};
}

// Whether some row does not see all keys of a block.
inline bool cuts(const Args& a, const Rows& rows, int64_t first, int count) {
  return seen_by(a, rows.first_query(), first, count).end < count ||
         seen_by(a, rows.last_query(), first, count).begin > 0;
}

// ---------------------------------------------------------------- masks

// The bias of keys [first, first + count) for the row of the mask that begins at element `row`, in whole vectors.
void load_bias(const Args& a, int64_t row, int64_t first, int count, float* bias) {
  const int64_t at = row + first * a.mask_key;
  if (a.mask_kind == Mask::add) {
    const float* from = static_cast<const float*>(a.mask) + at;
    float copy[key_block];
    if (a.mask_key != 1) {
      for (int j = 0; j < count; ++j) copy[j] = from[j * a.mask_key];
      from = copy;
    }
    for (int j = 0; j < count; j += width) {
      const F x = count - j < width ? load_n<DType::f32>(from + j, count - j) : load<DType::f32>(from + j);
      const F finite = max(set1(lowest), mul(x, set1(log2_e)));
      store<DType::f32>(bias + j, select_greater(x, set1(-infinity), finite, x));
    }
  } else {
    const int8_t* from = static_cast<const int8_t*>(a.mask) + at;
    int8_t copy[key_block];
    if (a.mask_key != 1) {
      for (int j = 0; j < count; ++j) copy[j] = from[j * a.mask_key];
      from = copy;
    }
    for (int j = 0; j < count; j += width) {
      const F x = to_float(count - j < width ? load_i8_n(from + j, count - j) : load_i8(from + j));
      store<DType::f32>(bias + j, select_greater(mul(x, x), set1(0), set1(0), set1(-infinity)));
    }
  }
}

// ---------------------------------------------------------------- keys and values in memory

template <Storage S>
constexpr int64_t stored_bytes = S == Storage::f32 ? 4 : S == Storage::int8 ? 1 : 2;
template <Storage S>
constexpr DType float_of_storage = S == Storage::bf16 ? DType::bf16 : S == Storage::f16 ? DType::f16 : DType::f32;

inline int64_t bytes_of(Storage storage) { return storage == Storage::f32 ? 4 : storage == Storage::int8 ? 1 : 2; }

template <DType D>
constexpr int64_t float_bytes = D == DType::f32 ? 4 : 2;

template <Storage S>
HALFBYTE_INLINE F load_stored(const char* p, F scale) {
  if constexpr (S == Storage::int8) return mul(to_float(load_i8(reinterpret_cast<const int8_t*>(p))), scale);
  return load<float_of_storage<S>>(p);
}
template <Storage S>
HALFBYTE_INLINE F load_stored_n(const char* p, F scale, int n) {
  if constexpr (S == Storage::int8) return mul(to_float(load_i8_n(reinterpret_cast<const int8_t*>(p), n)), scale);
  return load_n<float_of_storage<S>>(p, n);
}

// Keys or values of one (sequence, kv head), from one key on.
struct Stored {
  const char* rows;
  int64_t row_bytes;
  const float* scale;  // of int8
  int64_t scale_stride;

  Stored from(int64_t key) const {
    return {rows + key * row_bytes, row_bytes, scale ? scale + key * scale_stride : nullptr, scale_stride};
  }
};

inline Stored keys_of(const Args& a, const Rows& rows) {
  const int64_t bytes = bytes_of(a.kv_type);
  const int64_t scale = rows.batch * a.k_scale_batch + rows.kv_head * a.k_scale_head;
  return {static_cast<const char*>(a.k) + (rows.batch * a.k_batch + rows.kv_head * a.k_head) * bytes, a.k_row * bytes,
          a.k_scale ? a.k_scale + scale : nullptr, a.k_scale_row};
}
inline Stored values_of(const Args& a, const Rows& rows) {
  const int64_t bytes = bytes_of(a.kv_type);
  const int64_t scale = rows.batch * a.v_scale_batch + rows.kv_head * a.v_scale_head;
  return {static_cast<const char*>(a.v) + (rows.batch * a.v_batch + rows.kv_head * a.v_head) * bytes, a.v_row * bytes,
          a.v_scale ? a.v_scale + scale : nullptr, a.v_scale_row};
}

// Rows as float32, `stride` elements apart, with zeros after the head_size-th.
template <Storage S>
void convert_from(const Stored& from, int rows, int64_t head_size, float* to, int64_t stride) {
  for (int i = 0; i < rows; ++i, to += stride) {
    const char* const row = from.rows + i * from.row_bytes;
    const F scale = set1(from.scale ? from.scale[i * from.scale_stride] : 1.0f);
    int64_t d = 0;
    for (; d + width <= head_size; d += width) {
      store<DType::f32>(to + d, load_stored<S>(row + d * stored_bytes<S>, scale));
    }
    if (d == stride) continue;
    memset(to + d, 0, static_cast<size_t>(stride - d) * sizeof(float));
    const int left = static_cast<int>(head_size - d);
    if (left > 0) store_n<DType::f32>(to + d, load_stored_n<S>(row + d * stored_bytes<S>, scale, left), left);
  }
}

void convert(Storage storage, const Stored& from, int rows, int64_t head_size, float* to, int64_t stride) {
  switch (storage) {
    case Storage::bf16: return convert_from<Storage::bf16>(from, rows, head_size, to, stride);
    case Storage::f16: return convert_from<Storage::f16>(from, rows, head_size, to, stride);
    case Storage::int8: return convert_from<Storage::int8>(from, rows, head_size, to, stride);
    default: return convert_from<Storage::f32>(from, rows, head_size, to, stride);
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
