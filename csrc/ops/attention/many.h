// Attention with query rows in lanes: the queries lie transposed, keys and values are broadcast from where they are, a
// score is one lane of one register, and maximum, power and sum go down the columns.
//
//   scores   s[j][row] = sum of k[j][d] t[d][row]       6 keys x nv vectors of rows, one step per d
//   values   o[d][row] += v[j][d] p[j][row]             6 features x nv vectors of rows, one step per key
//
// On AVX512 a step of 6 x 4 vectors is 24 fma of 12 cycles and 10 loads of 5.
#pragma once
#include "ops/attention/rows.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int lanes = attention::task_rows;
// Keys or features of a tile. Of one vector alone 12, since 6 sums would wait for themselves.
template <int vectors>
constexpr int mr = vectors == 1 ? 12 : 6;

struct Scores {
  const float* k;
  int64_t k_row, head_size;
  const float* t;            // [head_size][lanes]
  float* s;                  // [key_block][lanes]
  float* top;                // [lanes], the maximum so far, joined by that of the block
  const float* key_bias;     // [keys], the same for all rows
  const float* bias;         // [keys][lanes]; both may be null
  const float *begin, *end;  // [lanes], the keys that position rules in; null: all
};

template <int keys, int vectors>
__attribute__((noinline)) void score_tile(const Scores& a, int64_t first, int64_t lane) {
  // Rows three by three: base, base + row and base + 2 row are addressing modes. The empty asm keeps gcc from deriving
  // the pointers from one another again.
  const int64_t k_row = a.k_row, size = a.head_size;
  const float* k[(keys + 2) / 3];
#pragma GCC unroll 4
  for (int i = 0; i < (keys + 2) / 3; ++i) {
    k[i] = a.k + (first + 3 * i) * k_row;
    asm("" : "+r"(k[i]));
  }
  F acc[keys][vectors];
#pragma GCC unroll 12
  for (int i = 0; i < keys; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) acc[i][v] = set1(0);
  const float* t = a.t + lane;
  for (int64_t d = 0; d < size; ++d, t += lanes) {
    F b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) b[v] = load<DType::f32>(t + v * width);
#pragma GCC unroll 12
    for (int i = 0; i < keys; ++i) {
      const F x = set1(k[i / 3][(i % 3) * k_row + d]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[i][v] = fma(x, b[v], acc[i][v]);
    }
  }
  if (a.key_bias) {
#pragma GCC unroll 12
    for (int i = 0; i < keys; ++i) {
      const F x = set1(a.key_bias[first + i]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[i][v] = biased(acc[i][v], x);
    }
  }
  if (a.bias) {
    const float* const bias = a.bias + first * lanes + lane;
#pragma GCC unroll 12
    for (int i = 0; i < keys; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[i][v] = biased(acc[i][v], load<DType::f32>(bias + i * lanes + v * width));
  }
  if (a.end) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const F begin = load<DType::f32>(a.begin + lane + v * width), end = load<DType::f32>(a.end + lane + v * width);
#pragma GCC unroll 12
      for (int i = 0; i < keys; ++i) {
        const F j = set1(static_cast<float>(first + i));
        acc[i][v] = select_greater(begin, j, set1(-infinity), select_greater(end, j, acc[i][v], set1(-infinity)));
      }
    }
  }
  float *const s = a.s + first * lanes + lane, *const top = a.top + lane;
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    F most = load<DType::f32>(top + v * width);
#pragma GCC unroll 12
    for (int i = 0; i < keys; ++i) {
      most = max(acc[i][v], most);
      store<DType::f32>(s + i * lanes + v * width, acc[i][v]);
    }
    store<DType::f32>(top + v * width, most);
  }
}

// The weights of one vector of rows in the place of their scores, of 16 * groups keys; returns their sum.
template <int groups>
__attribute__((noinline)) F weights_of(float* s, F top) {
  const auto weight = [&](int j) __attribute__((always_inline)) -> F {
    const F p = power_of_2(sub(load<DType::f32>(s + j * lanes), top));
    store<DType::f32>(s + j * lanes, p);
    return p;
  };
  const auto partial = [&](int c) __attribute__((always_inline)) -> F {  // c of Sum16
    F sum = weight(c);
#pragma GCC unroll 4
    for (int g = 1; g < groups; ++g) sum = add(sum, weight(c + 16 * g));
    return sum;
  };
  F quarter[4];
#pragma GCC unroll 1
  for (int c = 0; c < 4; ++c) quarter[c] = add(add(partial(c), partial(c + 8)), add(partial(c + 4), partial(c + 12)));
  return add(add(quarter[0], quarter[2]), add(quarter[1], quarter[3]));
}

struct Values {
  const float* v;
  int64_t v_row;
  int keys;
  const float* p;      // [keys][lanes]
  float* o;            // [head_size][lanes]
  const float* decay;  // [lanes], what o is multiplied with first
  bool begin;          // o counts as 0
};

template <int features, int vectors>
__attribute__((noinline)) void value_tile(const Values& a, int64_t first, int64_t lane) {
  F acc[features][vectors];
  float* const o = a.o + first * lanes + lane;
  if (a.begin) {
#pragma GCC unroll 12
    for (int i = 0; i < features; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[i][v] = set1(0);
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const F decay = load<DType::f32>(a.decay + lane + v * width);
#pragma GCC unroll 12
      for (int i = 0; i < features; ++i) acc[i][v] = mul(load<DType::f32>(o + i * lanes + v * width), decay);
    }
  }
  const float *p = a.p + lane, *x = a.v + first;
  const int64_t v_row = a.v_row;
  for (int j = 0; j < a.keys; ++j, p += lanes, x += v_row) {
    F b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) b[v] = load<DType::f32>(p + v * width);
#pragma GCC unroll 12
    for (int i = 0; i < features; ++i) {
      const F y = set1(x[i]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[i][v] = fma(y, b[v], acc[i][v]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < features; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store<DType::f32>(o + i * lanes + v * width, acc[i][v]);
}

template <int m, int vectors>
inline void any_score_tile(int keys, const Scores& a, int64_t first, int64_t lane) {
  if (keys == m) return score_tile<m, vectors>(a, first, lane);
  if constexpr (m > 1) any_score_tile<m - 1, vectors>(keys, a, first, lane);
}
template <int m, int vectors>
inline void any_value_tile(int features, const Values& a, int64_t first, int64_t lane) {
  if (features == m) return value_tile<m, vectors>(a, first, lane);
  if constexpr (m > 1) any_value_tile<m - 1, vectors>(features, a, first, lane);
}
template <int groups>
inline F any_weights_of(int g, float* s, F top) {
  if constexpr (groups > 1) {
    if (g < groups) return any_weights_of<groups - 1>(g, s, top);
  }
  return weights_of<groups>(s, top);
}

// Calls tile(count, first) for nearly equal parts of at most `most`: a narrow last one would wait for its own sums.
template <int most, class Tile>
inline void in_tiles(int64_t total, Tile&& tile) {
  int64_t tiles = (total + most - 1) / most;
  for (int64_t first = 0; first < total; --tiles) {
    const int64_t count = (total - first + tiles - 1) / tiles;
    tile(static_cast<int>(count), first);
    first += count;
  }
}

struct Sums {
  float *m, *l;  // [lanes]
};

// One block of keys for `vectors` vectors of rows.
template <int vectors>
void strip(const Scores& scores, const Values& values, const Sums& sums, float* decay, int64_t lane) {
  constexpr int most = mr<vectors>;
  in_tiles<most>(values.keys, [&](int n, int64_t j) { any_score_tile<most, vectors>(n, scores, j, lane); });
  const int groups = (values.keys + 15) / 16;
  for (int j = values.keys; j < groups * 16; ++j) {
    for (int v = 0; v < vectors; ++v) store<DType::f32>(scores.s + j * lanes + lane + v * width, set1(-infinity));
  }
  for (int v = 0; v < vectors; ++v) {
    const int64_t at = lane + v * width;
    const F top = load<DType::f32>(scores.top + at), c = power_of_2(sub(load<DType::f32>(sums.m + at), top));
    const F total = any_weights_of<key_block / 16>(groups, scores.s + at, top);
    store<DType::f32>(sums.m + at, top);
    store<DType::f32>(sums.l + at, fma(load<DType::f32>(sums.l + at), c, total));
    store<DType::f32>(decay + at, c);
  }
  in_tiles<most>(scores.head_size, [&](int n, int64_t d) { any_value_tile<most, vectors>(n, values, d, lane); });
}
template <int vectors>
inline void any_strip(int n, const Scores& scores, const Values& values, const Sums& sums, float* decay, int64_t lane) {
  if constexpr (vectors > 1) {
    if (n < vectors) return any_strip<vectors - 1>(n, scores, values, sums, decay, lane);
  }
  strip<vectors>(scores, values, sums, decay, lane);
}

// t[d][row] = q * f. Lanes after the last row repeat one: they cost nothing and are not stored.
template <DType D>
void gather(const Args& a, const Rows& rows, float* t) {
  const F factor = set1(query_factor(a));
  Walk row(rows);
  for (int r = 0; r < rows.count; r += width) {
    const char* from[width];
    for (int i = 0; i < width; ++i) {
      from[i] = static_cast<const char*>(a.q) + q_at(a, rows, row) * float_bytes<D>;
      if (r + i + 1 < rows.count) row.next();
    }
    for (int64_t d = 0; d < a.head_size; d += width) {
      const int64_t left = a.head_size - d;
      F x[width];
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) {
        const char* const p = from[i] + d * float_bytes<D>;
        x[i] = mul(left < width ? load_n<D>(p, static_cast<int>(left)) : load<D>(p), factor);
      }
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) store<DType::f32>(t + (d + i) * lanes + r, x[i]);
    }
  }
}

template <DType D>
void scatter(const Args& a, const Rows& rows, const float* o, const float* l) {
  Walk row(rows);
  for (int r = 0; r < rows.count; r += width) {
    char* to[width];
    for (int i = 0; i < width; ++i) {
      to[i] = static_cast<char*>(a.out) + out_at(a, rows, row) * float_bytes<D>;
      if (r + i + 1 < rows.count) row.next();
    }
    const int here = rows.count - r;
    const F inverse = inverse_of(load<DType::f32>(l + r));
    for (int64_t d = 0; d < a.head_size; d += width) {
      const int64_t left = a.head_size - d;
      F x[width];
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) x[i] = mul(load<DType::f32>(o + (d + i) * lanes + r), inverse);
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) {
        if (i >= here) break;
        char* const p = to[i] + d * float_bytes<D>;
        if (left < width) {
          store_n<D>(p, x[i], static_cast<int>(left));
        } else {
          store<D>(p, x[i]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
