// Tiles of weights in windows (core/sparse_panel.h) on AVX512-VBMI: vpermb takes the activations that a line of weights wants out
// of the 64 of a window, in a register, for all 16 channels at once.
//
// vpermb and vpdpbusd share one of their ports on Zen 4 and 5, so that a pair takes 1.5 times as long as a product alone: at best
// 67 % of the peak, and 2:4 runs at most 1.33 times as fast as dense. 12 rows: their windows, sums and three more fill the
// registers. Indices of N:M patterns are taken out of their bits once for all rows of a tile, 16 windows at a time: one after the
// other between the products they cost 15 % of the speed.
#pragma once
#include <string.h>

#include "core/sparse_panel.h"
#include "simd/vnni512.h"

#include "simd/epilogue.h"

namespace halfbyte::avx512_vbmi {
namespace {

constexpr int at_once = 12;  // rows
constexpr int window_mr = 96, windows_at_once = 16;
constexpr int inline_rows = 4;  // up to so many rows are not worth a detour of the indices through memory

// The strips of at most 12 rows that a tile is computed in, of nearly equal height.
struct Part {
  int begin, rows;
};
inline int parts_of(int rows) { return (rows + at_once - 1) / at_once; }
inline Part part_of(int rows, int i) {
  const int parts = parts_of(rows), begin = rows * i / parts;
  return {begin, rows * (i + 1) / parts - begin};
}

// strip: part by part, [window][rows of the part][64]
void arrange_windows(const ArrangeArgs& args) {
  const I flip = _mm512_set1_epi8(-128);
  auto* strip = static_cast<uint8_t*>(args.strip);
  for (int i = 0; i < parts_of(args.rows); ++i) {
    const Part part = part_of(args.rows, i);
    const auto* const a = static_cast<const uint8_t*>(args.a) + part.begin * args.lda;
    for (int64_t k = 0; k < args.k_padded; k += window) {
      for (int r = 0; r < part.rows; ++r, strip += window) {
        _mm512_storeu_si512(strip, _mm512_xor_si512(_mm512_loadu_si512(a + r * args.lda + k), flip));
      }
    }
  }
}

int64_t window_strip_bytes(int rows, int64_t k_padded) { return rows * k_padded; }

// Of a pattern N:M, for each line of a window: in which bits of its qword the index of a byte begins, and where its group of M.
template <int nonzero, int of>
struct Pattern {
  static constexpr int bits = of == 4 ? 2 : 4, per_line = 8 / bits, count = window / of * nonzero / quad;
  static constexpr int index_bytes = count / per_line * 64;  // of a window
  struct Table {
    alignas(64) uint8_t shift[count][64], group[count][64];
    constexpr Table() : shift(), group() {
      for (int v = 0; v < count; ++v) {
        for (int b = 0; b < 64; ++b) {
          shift[v][b] = static_cast<uint8_t>(v % per_line * 8 * bits + b % 8 * bits);
          group[v][b] = static_cast<uint8_t>((v * quad + b % quad) / nonzero * of);
        }
      }
    }
  };
  static constexpr Table table{};

  static HALFBYTE_INLINE I at(const uint8_t* index, int v) {
    const I line = _mm512_loadu_si512(index + v / per_line * 64), shift = _mm512_load_si512(table.shift[v]);
    const I field = _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, line), _mm512_set1_epi8((1 << bits) - 1));
    return _mm512_or_si512(field, _mm512_load_si512(table.group[v]));
  }
};

// Lines of a half, from some window on.
struct Lines {
  const uint8_t *counts, *index, *values;
};

// How many lines of values ahead of the multiplication they are fetched where there are few rows, into L1. Fetching a panel ahead,
// into L2, took a fifth longer where the weights are in L3.
constexpr int lines_ahead = 64;

template <int rows>
HALFBYTE_INLINE void multiply_line(I (&sum)[rows], I at, const uint8_t* values, const I (&x)[rows]) {
  const I b = _mm512_loadu_si512(values);
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) dot4(sum[r], _mm512_permutexvar_epi8(at, x[r]), b);
}

// sums[r][0..15], ld apart, (+)= the products of `windows` windows of a half. Index: Pattern, or void for bytes.
template <int rows, class Index>
void gather(const Lines& from, int64_t windows, const uint8_t* strip, bool add, int32_t* sums, int64_t ld) {
  constexpr int chains = rows <= inline_rows ? 2 : 1;  // a product has a latency of four cycles
  const uint8_t *index = from.index, *values = from.values;
  I sum[chains][rows];
#pragma GCC unroll 2
  for (int i = 0; i < chains; ++i)
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) sum[i][r] = add && i == 0 ? load_i(sums + r * ld) : _mm512_setzero_si512();
  for (int64_t w = 0; w < windows; ++w, strip += rows * window) {
    I x[rows];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) x[r] = _mm512_loadu_si512(strip + r * window);
    if constexpr (!__is_same(Index, void)) {
      for (int line = 0; line < Index::index_bytes; line += 64) {
        __builtin_prefetch(index + lines_ahead / Index::count * Index::index_bytes + line);
      }
#pragma GCC unroll 8
      for (int v = 0; v < Index::count; ++v, values += 64) {
        __builtin_prefetch(values + lines_ahead * 64);
        multiply_line(sum[v % chains], Index::at(index, v), values, x);
      }
      index += Index::index_bytes;
    } else {
      int left = from.counts[w];
      for (; left >= 2; left -= 2, index += 128, values += 128) {
        multiply_line(sum[0], _mm512_loadu_si512(index), values, x);
        multiply_line(sum[chains - 1], _mm512_loadu_si512(index + 64), values + 64, x);
      }
      if (left > 0) {
        multiply_line(sum[0], _mm512_loadu_si512(index), values, x);
        index += 64;
        values += 64;
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
    if constexpr (chains == 2) sum[0][r] = add_i(sum[0][r], sum[1][r]);
    store_i(sums + r * ld, sum[0][r]);
  }
}

using Gather = void (*)(const Lines&, int64_t, const uint8_t*, bool, int32_t*, int64_t);
template <class Index>
constexpr Gather few_gathers[inline_rows] = {gather<1, Index>, gather<2, Index>, gather<3, Index>, gather<4, Index>};
constexpr Gather gathers[at_once] = {gather<1, void>, gather<2, void>, gather<3, void>, gather<4, void>,
                                     gather<5, void>, gather<6, void>, gather<7, void>, gather<8, void>,
                                     gather<9, void>, gather<10, void>, gather<11, void>, gather<12, void>};

// All rows of a tile, the windows from `first` on.
void gather_rows(const TileArgs& t, const Lines& from, int64_t first, int64_t windows, int32_t* sums) {
  const int64_t ld = int64_t{t.panels} * panel_width;
  for (int i = 0; i < parts_of(t.rows); ++i) {
    const Part part = part_of(t.rows, i);
    const uint8_t* const strip = static_cast<const uint8_t*>(t.a) + part.begin * t.quads * quad + first * part.rows * window;
    gathers[part.rows - 1](from, windows, strip, first > 0, sums + part.begin * ld, ld);
  }
}

// A half with indices in bits.
template <class P>
void pattern_half(const TileArgs& t, Lines from, int64_t windows, int32_t* sums) {
  if (t.rows <= inline_rows) {
    const int64_t ld = int64_t{t.panels} * panel_width;
    return few_gathers<P>[t.rows - 1](from, windows, static_cast<const uint8_t*>(t.a), false, sums, ld);
  }
  alignas(64) uint8_t widened[windows_at_once * P::count * 64];
  int64_t first = 0;
  do {
    const int64_t count = windows - first < windows_at_once ? windows - first : windows_at_once;
    uint8_t* out = widened;
    for (int64_t w = 0; w < count; ++w, from.index += P::index_bytes) {
#pragma GCC unroll 8
      for (int v = 0; v < P::count; ++v, out += 64) _mm512_store_si512(out, P::at(from.index, v));
    }
    gather_rows(t, {from.counts, widened, from.values}, first, count, sums);
    from.counts += count;
    from.values += count * P::count * 64;
    first += count;
  } while (first < windows);
}

void window_tile(const TileArgs& t) {
  for (int i = 0; i < 2 * t.panels; ++i) {
    const uint8_t* const begin = t.b + (t.panel_offsets[i / 2] - t.panel_offsets[0]);
    const WindowPanel& panel = *reinterpret_cast<const WindowPanel*>(begin);
    const Lines from{begin + panel.counts[i % 2], begin + panel.index[i % 2], begin + panel.lines[i % 2]};
    int32_t* const sums = t.acc + i * half_panel;
    if (panel.per_window == 0) {
      gather_rows(t, from, 0, panel.windows, sums);
    } else if (panel.bits == 4) {
      pattern_half<Pattern<4, 8>>(t, from, panel.windows, sums);
    } else if (panel.per_window == 8) {
      pattern_half<Pattern<2, 4>>(t, from, panel.windows, sums);
    } else {
      pattern_half<Pattern<1, 4>>(t, from, panel.windows, sums);
    }
  }
}

}  // namespace
}  // namespace halfbyte::avx512_vbmi
