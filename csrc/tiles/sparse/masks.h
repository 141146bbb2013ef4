// Tiles of float32 weights anywhere (core/sparse_panel.h, masks): rows in the lanes. Each value is broadcast and multiplied with
// all rows of its k, so nothing is wasted but the loads: 9 for 8 products. Included after a simd header.
//
// 64 k of 128 rows are 32 KiB, which stay in L1 while up to 128 channels go over them; the sums of those channels, 64 KiB, come
// from L2 in the order in which they are needed. One panel at a time read the rows from L3 four times as often: 37 % instead
// of 45 % of the peak at 90 % zeros and K = 4096.
#pragma once
#include "core/sparse_panel.h"
#include "tiles/sparse/strips.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int mask_vectors = 8, mask_mr = mask_vectors * width;

struct MaskStream {
  const uint64_t* masks;
  const uint8_t* order;
  const float* values;
};

// With few vectors two channels go side by side, for an FMA takes four cycles, until the one with fewer values has no more.
template <int vectors>
HALFBYTE_INLINE void mask_block(MaskStream& s, const float* strip, float* sums) {
  constexpr int lanes = vectors * width, channels = width > 1 && vectors <= 4 ? 2 : 1;
  for (int i = 0; i < panel_width; i += channels) {
    F sum[channels][vectors];
    float* to[channels];
    uint64_t left[channels];
    const float* value[channels];
#pragma GCC unroll 4
    for (int c = 0; c < channels; ++c) {
      to[c] = sums + s.order[i + c] * lanes;
      left[c] = s.masks[i + c];
      value[c] = c ? value[c - 1] + __builtin_popcountll(left[c - 1]) : s.values;
      __builtin_prefetch(value[c] + 768);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[c][v] = load<DType::f32>(to[c] + v * width);
    }
#pragma GCC unroll 4
    for (int first = 0; first < channels; ++first) {
      while (left[first]) {
#pragma GCC unroll 4
        for (int c = first; c < channels; ++c) {
          const float* const x = strip + static_cast<uint64_t>(__builtin_ctzll(left[c])) * lanes;
          left[c] &= left[c] - 1;
          const F w = set1(*value[c]++);
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) sum[c][v] = fma(w, load<DType::f32>(x + v * width), sum[c][v]);
        }
      }
    }
    s.values = value[channels - 1];
#pragma GCC unroll 4
    for (int c = 0; c < channels; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) store<DType::f32>(to[c] + v * width, sum[c][v]);
    }
  }
  s.masks += panel_width;
  s.order += panel_width;
}

HALFBYTE_INLINE const uint8_t* panel_of(const TileArgs& t, int p) { return t.b + (t.panel_offsets[p] - t.panel_offsets[0]); }

HALFBYTE_INLINE void open_masks(const TileArgs& t, MaskStream (&streams)[max_panels]) {
  for (int p = 0; p < t.panels; ++p) {
    const uint8_t* const begin = panel_of(t, p);
    const MaskPanel& panel = *reinterpret_cast<const MaskPanel*>(begin);
    streams[p] = {reinterpret_cast<const uint64_t*>(begin + panel.masks), begin + panel.order,
                  reinterpret_cast<const float*>(begin + panel.values)};
  }
}

template <int vectors>
void masked(const TileArgs& t) {
  constexpr int lanes = vectors * width, of_panel = panel_width * lanes;
  alignas(64) float sums[max_panels * of_panel];
  MaskStream streams[max_panels];
  open_masks(t, streams);
  for (int i = 0; i < t.panels * of_panel; i += width) store<DType::f32>(sums + i, set1(0));
  const int64_t blocks = t.quads * quad / window;
  for (int64_t b = 0; b < blocks; ++b) {
    const float* const strip = static_cast<const float*>(t.a) + b * window * lanes;
    for (int p = 0; p < t.panels; ++p) mask_block<vectors>(streams[p], strip, sums + p * of_panel);
  }
  rows_of_channels(sums, lanes, t.panels * panel_width, t.rows, t.t, int64_t{t.panels} * panel_width);
}

constexpr void (*mask_tiles[mask_vectors])(const TileArgs&) = {masked<1>, masked<2>, masked<3>, masked<4>,
                                                               masked<5>, masked<6>, masked<7>, masked<8>};

inline int64_t mask_lanes(int rows) { return (rows + width - 1) / width * width; }

inline void mask_tile(const TileArgs& t) { mask_tiles[mask_lanes(t.rows) / width - 1](t); }

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
