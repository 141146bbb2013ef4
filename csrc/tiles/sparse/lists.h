// Tiles of float32 weights anywhere for few rows (core/sparse_panel.h, lists): one vector of rows in the lanes. Included after a
// simd header with vectors.
//
// The lines of some windows are filled up first, with weights of 0 for a unit behind the strip. Then eight channels go over them side
// by side: they end together, and no sum waits for the one before it. With masks the end of each channel's values is mispredicted,
// and an FMA takes four cycles. But at 90 % zeros 11 lines hold 6.4 values of a channel: more vectors of rows would lose by that.
#pragma once
#include <string.h>

#include "tiles/sparse/masks.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

struct ListStream {  // of a half
  const uint8_t* lines;
  const uint16_t *places, *masks;
  const uint8_t* index;
  const float* values;
  int64_t pairs;
};

HALFBYTE_INLINE bool has_lists(const uint8_t* panel) { return reinterpret_cast<const MaskPanel*>(panel)->lists != 0; }

// Of a panel with lists.
HALFBYTE_INLINE ListStream list_stream(const uint8_t* begin, int half) {
  const ListPanel& panel = *reinterpret_cast<const ListPanel*>(begin + reinterpret_cast<const MaskPanel*>(begin)->lists);
  return {begin + panel.lines[half], reinterpret_cast<const uint16_t*>(begin + panel.places[half]),
          reinterpret_cast<const uint16_t*>(begin + panel.masks[half]), begin + panel.index[half],
          reinterpret_cast<const float*>(begin + panel.values[half]), panel.pairs[half]};
}

// Of 16 rows the strip of these takes 16 KiB, which stay in L1.
constexpr int windows_at_once = 4, most_lines = windows_at_once * window;

struct Filled {
  alignas(64) float values[most_lines * half_panel];
  alignas(64) int32_t units[most_lines * half_panel];
};

// A line: its values and their units, in floats from the strip's begin; 0 and `empty` where it has none.
#if defined __AVX512F__
HALFBYTE_INLINE F expanded(__mmask16 mask, const float* values) {
  F w = _mm512_loadu_ps(values);
  // From memory it takes longer, and it waits for what its target held before.
  asm("vexpandps %0, %0%{%1%}%{z%}" : "+v"(w) : "Yk"(mask));
  return w;
}
HALFBYTE_INLINE void fill_line(uint16_t mask, const float* values, const uint8_t* index, int32_t first, int32_t empty, float* to,
                               int32_t* units) {
  const I k = _mm512_add_epi32(_mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(index))), set1_i(first));
  _mm512_store_ps(to, expanded(mask, values));
  _mm512_store_si512(units, _mm512_mask_slli_epi32(set1_i(empty), mask, k, 4));
}
#else
// Where the lanes of eight get their values from, for each mask.
struct Expansion {
  uint8_t from[256][8];
};
constexpr Expansion expansion = [] {
  Expansion e{};
  for (int mask = 0; mask < 256; ++mask) {
    for (int c = 0, at = 0; c < 8; ++c) e.from[mask][c] = static_cast<uint8_t>(mask >> c & 1 ? at++ : 0);
  }
  return e;
}();

HALFBYTE_INLINE void fill_line(uint16_t mask, const float* values, const uint8_t* index, int32_t first, int32_t empty, float* to,
                               int32_t* units) {
  const auto bytes = [](const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); };
  const I bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (int c = 0; c < half_panel; c += 8) {
    const int own = mask >> c & 255;
    const I here = _mm256_cmpeq_epi32(_mm256_and_si256(set1_i(own), bit), bit);
    const F w = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), bytes(expansion.from[own]));
    _mm256_store_ps(to + c, _mm256_and_ps(w, from_bits(here)));
    const I unit = _mm256_add_epi32(bytes(index + c), set1_i(first));
    _mm256_store_si256(reinterpret_cast<__m256i*>(units + c), _mm256_blendv_epi8(set1_i(empty), _mm256_slli_epi32(unit, 3), here));
    values += __builtin_popcount(static_cast<unsigned>(own));
  }
}
#endif

// Appends the lines of the next window, whose first k is `first`, to `at` lines; returns how many there are then. What comes next
// of this half would be far away by then: the other panels are filled in between.
HALFBYTE_INLINE int fill(ListStream& s, int64_t first, int64_t k_padded, Filled& to, int at) {
  constexpr int ahead = 768;  // values, or indices
  const int lines = *s.lines++, whole = (lines + 1) / 2 * 2;
  const float* values = s.values;
  for (int i = 0; i < lines; ++i, ++at) {
    __builtin_prefetch(values + ahead);
    __builtin_prefetch(s.index + i * half_panel + ahead);
    fill_line(s.masks[i], values, s.index + i * half_panel, static_cast<int32_t>(first), static_cast<int32_t>(k_padded * width),
              to.values + at * half_panel, to.units + at * half_panel);
    values += __builtin_popcount(s.masks[i]);
  }
  s.values = values;
  s.masks += whole;
  s.index += whole * half_panel;
  return at;
}

HALFBYTE_INLINE void side_by_side(const Filled& lists, int count, const float* strip, float* sums) {
  constexpr int channels = 8;
  for (int first = 0; first < half_panel; first += channels) {
    float* const to = sums + first * width;
    F sum[channels];
#pragma GCC unroll 8
    for (int c = 0; c < channels; ++c) sum[c] = load<DType::f32>(to + c * width);
    for (int line = first; line < count * half_panel; line += half_panel) {
#pragma GCC unroll 2
      for (int part = 0; part < channels; part += 4) {  // one load for four weights, one for two units
        F w[4];
        broadcast_each(lists.values + line + part, w);
        uint64_t units[2];
        memcpy(units, lists.units + line + part, sizeof units);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          const uint64_t unit = c % 2 ? units[c / 2] >> 32 : units[c / 2] & UINT32_MAX;
          sum[part + c] = fma(w[c], load<DType::f32>(strip + unit), sum[part + c]);
        }
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < channels; ++c) store<DType::f32>(to + c * width, sum[c]);
  }
}

// A tile of one vector of rows.
inline void listed(const TileArgs& t) {
  constexpr int of_half = half_panel * width, of_panel = 2 * of_half;
  alignas(64) float sums[max_panels * of_panel];
  MaskStream masks[max_panels];
  ListStream lists[max_panels][2];
  open_masks(t, masks);
  for (int p = 0; p < t.panels; ++p) {
    if (!has_lists(panel_of(t, p))) continue;
    for (int h = 0; h < 2; ++h) lists[p][h] = list_stream(panel_of(t, p), h);
  }
  for (int i = 0; i < t.panels * of_panel; i += width) store<DType::f32>(sums + i, set1(0));
  const float* const strip = static_cast<const float*>(t.a);
  const int64_t k_padded = t.quads * quad;
  for (int64_t first = 0; first < k_padded; first += windows_at_once * window) {
    const int64_t end = k_padded - first < windows_at_once * window ? k_padded : first + windows_at_once * window;
    for (int p = 0; p < t.panels; ++p) {
      float* const to = sums + p * of_panel;
      if (has_lists(panel_of(t, p))) {
        for (int h = 0; h < 2; ++h) {
          Filled filled;
          int lines = 0;
          for (int64_t k = first; k < end; k += window) lines = fill(lists[p][h], k, k_padded, filled, lines);
          side_by_side(filled, lines, strip, to + h * of_half);
        }
      } else {
        for (int64_t k = first; k < end; k += window) mask_block<1>(masks[p], strip + k * width, to);
      }
    }
  }
  rows_of_channels(sums, width, t.panels * panel_width, t.rows, t.t, int64_t{t.panels} * panel_width);
}

// A tile of whole vectors of rows.
inline void tile_anywhere(const TileArgs& t) {
  if (t.rows <= width) return listed(t);
  mask_tile(t);
}

// The strip, and behind its last k, in the room that strip_bytes_of() has for it, a unit of what leaves any sum as it is, -0 included.
inline void arrange_anywhere(const ArrangeArgs& args) {
  const int64_t lanes = mask_lanes(args.rows);
  arrange_units<1, 0>(args, lanes);
  store<DType::f32>(static_cast<float*>(args.strip) + args.k_padded * lanes, set1(-0.0f));
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
