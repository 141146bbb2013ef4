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

template <int vectors>
HALFBYTE_INLINE void mask_block(MaskStream& s, const float* strip, float* sums) {
  constexpr int lanes = vectors * width;
  const float* value = s.values;
  for (int i = 0; i < panel_width; ++i) {
    float* const to = sums + s.order[i] * lanes;
    F sum[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[v] = load<DType::f32>(to + v * width);
    for (uint64_t left = s.masks[i]; left; left &= left - 1) {
      const float* const x = strip + __builtin_ctzll(left) * lanes;
      const F w = set1(*value++);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[v] = fma(w, load<DType::f32>(x + v * width), sum[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store<DType::f32>(to + v * width, sum[v]);
  }
  s.values = value;
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
