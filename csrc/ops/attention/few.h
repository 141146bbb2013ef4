// Attention of up to few_rows query rows, as when decoding: lanes of query rows would be empty, so scores have keys in
// lanes, and outputs features. Every number is computed as in many.h.
//
//   scores   s[row][j] = sum of q[row][d] k[j][d]   key_spans vectors of keys, whose columns are transposed in
//                                                   registers, eight 32-bit words at a time
//   values   o[row][d] += p[row][j] v[j][d]         few_vectors vectors of features, one step per key
//
// On AVX512, 3 rows and a head of 64: 42 cycles per 16 keys x 16 d (24 of fma, 28 of the four pipes with the shuffles,
// 28 of loads, 32 of the 6 accumulators' chains), 7 per key of values (6 of fma).
#pragma once
#include "ops/attention/rows.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int few_rows = 4, span_keys = key_spans * width;

// Codes that share 32 bits are transposed together and taken apart afterwards.
template <Storage S>
constexpr int packed = S == Storage::bf16 ? 2 : S == Storage::int8 ? 4 : 1;
template <Storage S>
constexpr int columns = 8 * packed<S>;

// Column c of the columns<S> that x holds.
template <Storage S>
HALFBYTE_INLINE F column(const F (&x)[8], int c, F scale) {
  const I word = bits(x[c / packed<S>]);
  if constexpr (S == Storage::bf16) {
    return from_bits(c % 2 ? and_i(word, set1_i(static_cast<int32_t>(0xffff0000))) : shift_left<16>(word));
  } else if constexpr (S == Storage::int8) {
    I high = word;
    if (c % 4 == 0) high = shift_left<24>(word);
    if (c % 4 == 1) high = shift_left<16>(word);
    if (c % 4 == 2) high = shift_left<8>(word);
    return mul(to_float(shift_right<24>(high)), scale);
  } else {
    return x[c];
  }
}

struct FewScores {
  const char* k;
  int64_t k_bytes, head_size;  // a multiple of columns<S>
  const float* scale;          // of the keys, where int8
  const float* q;              // [head_size][few_rows]
  float* s;  // [rows][key_block]
};

template <Storage S, int rows>
__attribute__((noinline)) void few_scores(const FewScores& a) {
  F acc[key_spans][rows], scale[key_spans];
#pragma GCC unroll 2
  for (int g = 0; g < key_spans; ++g) {
    scale[g] = S == Storage::int8 ? load<DType::f32>(a.scale + g * width) : set1(1);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) acc[g][r] = set1(0);
  }
  const int64_t k_bytes = a.k_bytes;
  const char* k = a.k;
  const float* q = a.q;
  for (int64_t d = 0; d < a.head_size; d += columns<S>) {
    F x[key_spans][8];
#pragma GCC unroll 2
    for (int g = 0; g < key_spans; ++g) {
      load_columns<S == Storage::f16 ? DType::f16 : DType::f32>(k + g * width * k_bytes, k_bytes, x[g]);
    }
#pragma GCC unroll 32
    for (int c = 0; c < columns<S>; ++c) {
      F y[key_spans];
#pragma GCC unroll 2
      for (int g = 0; g < key_spans; ++g) y[g] = column<S>(x[g], c, scale[g]);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const F t = set1(q[c * few_rows + r]);
#pragma GCC unroll 2
        for (int g = 0; g < key_spans; ++g) acc[g][r] = fma(y[g], t, acc[g][r]);
      }
    }
    k += columns<S> * stored_bytes<S>;
    q += columns<S> * few_rows;
  }
#pragma GCC unroll 2
  for (int g = 0; g < key_spans; ++g)
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) store<DType::f32>(a.s + r * key_block + g * width, acc[g][r]);
}

struct FewValues {
  const char* v;
  int64_t v_bytes;
  const float* scale;  // of the values, where int8
  int keys;
  const float* p;  // [rows][key_block]
  float* o;        // [rows][o_row]
  int64_t o_row;
  const float* decay;  // [rows]
};

template <Storage S, int rows, int vectors>
__attribute__((noinline)) void few_values(const FewValues& a, int64_t first) {
  F acc[rows][vectors];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      acc[r][v] = mul(load<DType::f32>(a.o + r * a.o_row + first + v * width), set1(a.decay[r]));
    }
  const char* x = a.v + first * stored_bytes<S>;
  const int64_t v_bytes = a.v_bytes;
  const float* const p = a.p;
#pragma GCC unroll 2
  for (int64_t j = 0; j < a.keys; ++j, x += v_bytes) {
    const F scale = S == Storage::int8 ? set1(a.scale[j]) : set1(1);
    F y[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) y[v] = load_stored<S>(x + v * width * stored_bytes<S>, scale);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const F weight = set1(p[r * key_block + j]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[r][v] = fma(weight, y[v], acc[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store<DType::f32>(a.o + r * a.o_row + first + v * width, acc[r][v]);
}

// The features that are left after tiles of `vectors`.
template <Storage S, int rows, int vectors>
inline void few_values_from(const FewValues& a, int64_t d, int64_t head_size) {
  for (; d + vectors * width <= head_size; d += vectors * width) few_values<S, rows, vectors>(a, d);
  if constexpr (vectors > 1) few_values_from<S, rows, vectors / 2>(a, d, head_size);
}

// The tiles of one block by storage and number of rows.
template <Storage S, int rows>
void few_block_scores(const Stored& k, int keys, int64_t head_size, const float* q, float* s, float* copy,
                      const float* scale) {
  const int64_t stride = padded(head_size);
  const int whole = head_size % columns<S> == 0 ? keys / span_keys * span_keys : 0;
  int j = 0;
  for (; j < whole; j += span_keys) {
    few_scores<S, rows>({k.rows + j * k.row_bytes, k.row_bytes, head_size, scale + j, q, s + j});
  }
  for (; j < keys; j += span_keys) {  // a copy with zeros for the keys and columns that are not there
    const int here = keys - j < span_keys ? keys - j : span_keys;
    convert_from<S>(k.from(j), here, head_size, copy, stride);
    memset(copy + here * stride, 0, static_cast<size_t>((span_keys - here) * stride) * sizeof(float));
    const int64_t size = (head_size + 7) / 8 * 8;
    few_scores<Storage::f32, rows>({reinterpret_cast<const char*>(copy), stride * 4, size, nullptr, q, s + j});
  }
}
template <Storage S, int rows>
void few_block_values(const FewValues& a, int64_t head_size) {
  few_values_from<S, rows, few_vectors>(a, 0, head_size);
}

using FewBlockScores = void (*)(const Stored&, int, int64_t, const float*, float*, float*, const float*);
using FewBlockValues = void (*)(const FewValues&, int64_t);
constexpr FewBlockScores few_block_scores_of[4][few_rows] = {
#define ROWS(S) {few_block_scores<S, 1>, few_block_scores<S, 2>, few_block_scores<S, 3>, few_block_scores<S, 4>}
    ROWS(Storage::f32), ROWS(Storage::bf16), ROWS(Storage::f16), ROWS(Storage::int8)
#undef ROWS
};
constexpr FewBlockValues few_block_values_of[4][few_rows] = {
#define ROWS(S) {few_block_values<S, 1>, few_block_values<S, 2>, few_block_values<S, 3>, few_block_values<S, 4>}
    ROWS(Storage::f32), ROWS(Storage::bf16), ROWS(Storage::f16), ROWS(Storage::int8)
#undef ROWS
};

// Scores of one row of a block -> weights; returns their sum. `total` keys, a multiple of 16.
inline float few_weights(float* s, int total, float top) {
  Sum16 sum;
  sum.clear();
  for (int j = 0; j < total; j += 16) {
#pragma GCC unroll 2
    for (int v = 0; v < Sum16::vectors; ++v) {
      const F p = power_of_2(sub(load<DType::f32>(s + j + v * width), set1(top)));
      store<DType::f32>(s + j + v * width, p);
      sum.add(v, p);
    }
  }
  return sum.total();
}

struct FewMemory {
  float *q, *o;              // [padded head][few_rows], [few_rows][padded head]
  float *s, *bias;           // [few_rows][key_block], [key_block]
  float *k_scale, *v_scale;  // [key_block] each
  float *k, *v;              // [span_keys][padded head], [key_block][padded head], float32
};

template <DType D>
void few_gather(const Args& a, const Rows& rows, float* q) {
  const F factor = set1(query_factor(a));
  Walk row(rows);
  for (int r = 0; r < rows.count; ++r, row.next()) {
    const char* const from = static_cast<const char*>(a.q) + q_at(a, rows, row) * float_bytes<D>;
    for (int64_t d = 0; d < a.head_size; d += width) {
      const int n = static_cast<int>(a.head_size - d < width ? a.head_size - d : width);
      const F x = n < width ? load_n<D>(from + d * float_bytes<D>, n) : load<D>(from + d * float_bytes<D>);
      float t[width];
      store<DType::f32>(t, mul(x, factor));
      for (int i = 0; i < n; ++i) q[(d + i) * few_rows + r] = t[i];
    }
  }
}

template <DType D>
void few_scatter(const Args& a, const Rows& rows, const float* o, const float* l) {
  Walk row(rows);
  for (int r = 0; r < rows.count; ++r, row.next(), o += padded(a.head_size)) {
    char* const to = static_cast<char*>(a.out) + out_at(a, rows, row) * float_bytes<D>;
    const F inverse = inverse_of(set1(l[r]));
    for (int64_t d = 0; d < a.head_size; d += width) {
      const int n = static_cast<int>(a.head_size - d < width ? a.head_size - d : width);
      const F x = mul(load<DType::f32>(o + d), inverse);
      if (n < width) {
        store_n<D>(to + d * float_bytes<D>, x, n);
      } else {
        store<D>(to + d * float_bytes<D>, x);
      }
    }
  }
}

// Masks, padding with -inf to a multiple of 16 keys, and the maximum of one row.
inline float few_mask(const Args& a, const Rows& rows, const Walk& row, int64_t first, int keys, float* s, float* bias,
                      float top) {
  if (a.mask_kind != Mask::none) {
    load_bias(a, mask_at(a, rows, row), first, keys, bias);
    for (int j = 0; j < keys; j += width) {
      store<DType::f32>(s + j, biased(load<DType::f32>(s + j), load<DType::f32>(bias + j)));
    }
  }
  const Range seen = seen_by(a, row.query, first, keys);
  for (int64_t j = 0; j < seen.begin; ++j) s[j] = -infinity;
  const int64_t total = (keys + 15) / 16 * 16;
  for (int64_t j = seen.end; j < total; ++j) s[j] = -infinity;
  F most = set1(top);
  for (int64_t j = 0; j < total; j += width) most = max(load<DType::f32>(s + j), most);
  return reduce_max(most);
}

void few(const Args& a, const Rows& rows, const FewMemory& memory) {
  const int64_t head_size = a.head_size, stride = padded(head_size);
  memset(memory.q, 0, static_cast<size_t>(few_rows * stride) * sizeof(float));
  memset(memory.o, 0, static_cast<size_t>(few_rows * stride) * sizeof(float));
  switch (a.q_type) {
    case DType::bf16: few_gather<DType::bf16>(a, rows, memory.q); break;
    case DType::f16: few_gather<DType::f16>(a, rows, memory.q); break;
    default: few_gather<DType::f32>(a, rows, memory.q); break;
  }
  alignas(64) float m[16], top[16], l[16] = {}, decay[16];
  for (int r = 0; r < 16; ++r) m[r] = top[r] = lowest;
  const bool in_place = head_size % width == 0;
  const int storage = static_cast<int>(a.kv_type);
  const FewBlockScores scores = few_block_scores_of[storage][rows.count - 1];
  const FewBlockValues values = few_block_values_of[in_place ? storage : 0][rows.count - 1];
  const Range seen = seen_by(a, rows);
  for (int64_t first = seen.begin; first < seen.end; first += key_block) {
    const int keys = static_cast<int>(seen.end - first < key_block ? seen.end - first : key_block);
    const int whole = (keys + 15) / 16 * 16;
    const Stored k = keys_of(a, rows).from(first), v = values_of(a, rows).from(first);
    if (a.kv_type == Storage::int8) {
      for (int j = 0; j < keys; ++j) {
        memory.k_scale[j] = k.scale[j * k.scale_stride];
        memory.v_scale[j] = v.scale[j * v.scale_stride];
      }
    }
    scores(k, keys, head_size, memory.q, memory.s, memory.k, memory.k_scale);
    Walk row(rows);
    for (int r = 0; r < rows.count; ++r, row.next()) {
      top[r] = few_mask(a, rows, row, first, keys, memory.s + r * key_block, memory.bias, m[r]);
    }
    for (int r = 0; r < rows.count; r += width) {
      store<DType::f32>(decay + r, power_of_2(sub(load<DType::f32>(m + r), load<DType::f32>(top + r))));
    }
    for (int r = 0; r < rows.count; ++r) {
      l[r] = __builtin_fmaf(l[r], decay[r], few_weights(memory.s + r * key_block, whole, top[r]));
      m[r] = top[r];
    }
    FewValues block{v.rows, v.row_bytes, memory.v_scale, keys, memory.s, memory.o, stride, decay};
    if (!in_place) {
      convert(a.kv_type, v, keys, head_size, memory.v, stride);
      block.v = reinterpret_cast<const char*>(memory.v), block.v_bytes = stride * 4;
    }
    values(block, in_place ? head_size : stride);
  }
  switch (a.out_type) {
    case DType::bf16: return few_scatter<DType::bf16>(a, rows, memory.o, l);
    case DType::f16: return few_scatter<DType::f16>(a, rows, memory.o, l);
    default: return few_scatter<DType::f32>(a, rows, memory.o, l);
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
