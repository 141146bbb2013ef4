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

constexpr int at_once = 12;        // rows
constexpr int window_mr = 48, windows_at_once = 16, most_lines = 8;

// strip: [window][rows][64]
void arrange_windows(const ArrangeArgs& args) {
  const I flip = _mm512_set1_epi8(-128);
  auto* strip = static_cast<uint8_t*>(args.strip);
  for (int64_t k = 0; k < args.k_padded; k += window) {
    for (int r = 0; r < args.rows; ++r, strip += window) {
      const I x = _mm512_loadu_si512(static_cast<const uint8_t*>(args.a) + r * args.lda + k);
      _mm512_storeu_si512(strip, _mm512_xor_si512(x, flip));
    }
  }
}

int64_t window_strip_bytes(int rows, int64_t k_padded) { return rows * k_padded; }

// Lines of a half, from some window on.
struct Lines {
  const uint8_t *counts, *index, *values;
};

// sums[r][0..15] (+)= the products of `windows` windows of a half. row_bytes: of a window of the strip, all its rows.
template <int rows>
void gather(const Lines& from, int64_t windows, const uint8_t* strip, int64_t window_bytes, bool add, int32_t* sums) {
  constexpr int chains = rows <= 4 ? 2 : 1;  // a product has a latency of four cycles
  const uint8_t *index = from.index, *values = from.values;
  I sum[chains][rows];
#pragma GCC unroll 2
  for (int i = 0; i < chains; ++i)
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) sum[i][r] = add && i == 0 ? load_i(sums + r * panel_width) : _mm512_setzero_si512();
  for (int64_t w = 0; w < windows; ++w, strip += window_bytes) {
    I x[rows];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) x[r] = _mm512_loadu_si512(strip + r * window);
    int left = from.counts[w];
    for (; left >= chains; left -= chains, index += 64 * chains, values += 64 * chains) {
#pragma GCC unroll 2
      for (int i = 0; i < chains; ++i) {
        const I at = _mm512_loadu_si512(index + 64 * i), b = _mm512_loadu_si512(values + 64 * i);
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) dot4(sum[i][r], _mm512_permutexvar_epi8(at, x[r]), b);
      }
    }
    for (; left > 0; --left, index += 64, values += 64) {
      const I at = _mm512_loadu_si512(index), b = _mm512_loadu_si512(values);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) dot4(sum[0][r], _mm512_permutexvar_epi8(at, x[r]), b);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
    if constexpr (chains == 2) sum[0][r] = add_i(sum[0][r], sum[1][r]);
    store_i(sums + r * panel_width, sum[0][r]);
  }
}

using Gather = void (*)(const Lines&, int64_t, const uint8_t*, int64_t, bool, int32_t*);
constexpr Gather gathers[at_once] = {gather<1>, gather<2>, gather<3>, gather<4>,  gather<5>,  gather<6>,
                                     gather<7>, gather<8>, gather<9>, gather<10>, gather<11>, gather<12>};

// Takes the indices of `windows` windows out of their bits.
void widen(const WindowPanel& panel, const uint8_t* index, int64_t windows, uint8_t* out) {
  const int bits = static_cast<int>(panel.bits), count = static_cast<int>(panel.per_window), per_line = 8 / bits;
  const int of = bits == 2 ? 4 : 8, nonzero = count * quad * of / window;
  I base[most_lines], fields[most_lines];
  for (int v = 0; v < count; ++v) {
    alignas(64) uint8_t group[64], shift[64];
    for (int b = 0; b < 64; ++b) {
      group[b] = static_cast<uint8_t>((v * quad + b % quad) / nonzero * of);
      shift[b] = static_cast<uint8_t>(v % per_line * 8 * bits + b % 8 * bits);
    }
    base[v] = _mm512_load_si512(group);
    fields[v] = _mm512_load_si512(shift);
  }
  const I mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
  for (int64_t w = 0; w < windows; ++w) {
    for (int v = 0; v < count; ++v, out += 64) {
      const I line = _mm512_loadu_si512(index + v / per_line * 64);
      const I field = _mm512_and_si512(_mm512_multishift_epi64_epi8(fields[v], line), mask);
      _mm512_storeu_si512(out, _mm512_or_si512(field, base[v]));
    }
    index += (count + per_line - 1) / per_line * 64;
  }
}

// All rows of a tile, strip by strip of at most 12.
void gather_rows(const TileArgs& t, const Lines& from, int64_t first, int64_t windows, int half) {
  const int strips = (t.rows + at_once - 1) / at_once;
  const int64_t window_bytes = int64_t{t.rows} * window;
  const auto* const strip = static_cast<const uint8_t*>(t.a) + first * window_bytes;
  for (int i = 0; i < strips; ++i) {
    const int begin = t.rows * i / strips, end = t.rows * (i + 1) / strips;
    gathers[end - begin - 1](from, windows, strip + begin * window, window_bytes, first > 0,
                             t.acc + begin * panel_width + half * half_panel);
  }
}

void window_tile(const TileArgs& t) {
  const WindowPanel& panel = *reinterpret_cast<const WindowPanel*>(t.b);
  for (int half = 0; half < 2; ++half) {
    Lines from{t.b + panel.counts[half], t.b + panel.index[half], t.b + panel.lines[half]};
    if (panel.per_window == 0) {
      gather_rows(t, from, 0, panel.windows, half);
      continue;
    }
    alignas(64) uint8_t widened[windows_at_once * most_lines * 64];
    const int per_line = 8 / static_cast<int>(panel.bits);
    const int64_t count = panel.per_window, index_bytes = (count + per_line - 1) / per_line * 64;
    int64_t first = 0;
    do {
      const int64_t windows = panel.windows - first < windows_at_once ? panel.windows - first : windows_at_once;
      widen(panel, from.index, windows, widened);
      gather_rows(t, {from.counts, widened, from.values}, first, windows, half);
      from.counts += windows;
      from.index += windows * index_bytes;
      from.values += windows * count * 64;
      first += windows;
    } while (first < panel.windows);
  }
}

}  // namespace
}  // namespace halfbyte::avx512_vbmi
