// Tiles of int4 blocks in groups of k (core/sparse_panel.h, nibbles), with the dot product of the ISA: activations u8, a + 128,
// times 16 w, s8: a code in the high half of a byte is signed as it stands there. What the 128 adds, which depends on the blocks
// that are stored, is taken out with a dot product of its own per block. Sums count 16 times, which changes no bit of what comes
// of them but the exponent; the scales of the channels take the 16 out again.
//
// Few rows: channels in the lanes, blocks unpacked in registers. More rows: in the lanes; up to 1024 k of a half are unpacked
// in L1 first, for weights are broadcast from memory. The float sums stay in registers beside those of a group, so a tile is
// half as many channels as with int8: 4 x 3 vectors need 7 loads for 12 products.
#pragma once
#include "tiles/sparse/blocks_int8.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

struct NibbleHalf {
  const uint8_t *pairs, *index, *lines, *scales;
  int scale_bytes;  // of 16 channels
};

HALFBYTE_INLINE NibbleHalf nibble_half(const TileArgs& t, const uint8_t* panel, int half) {
  const NibblePanel& p = *reinterpret_cast<const NibblePanel*>(panel);
  return {panel + p.pairs[half], panel + p.index[half], panel + p.lines[half], panel + p.scales[half], t.groups->scale_bytes / 2};
}

HALFBYTE_INLINE F load_scales(const NibbleHalf& h, int v) {
  return h.scale_bytes == half_panel * 4 ? load<DType::f32>(h.scales + v * width * 4) : load<DType::f16>(h.scales + v * width * 2);
}

HALFBYTE_INLINE void unpack(const uint8_t* line, I (&low)[per_half], I (&high)[per_half]) {
  const I mask = set1_i(static_cast<int32_t>(0xf0f0f0f0u));
#pragma GCC unroll 16
  for (int v = 0; v < per_half; ++v) {
    const I x = ByteUnits::vector(line + v * width * 4);
    low[v] = and_i(shift_left<4>(x), mask);
    high[v] = and_i(x, mask);
  }
}

// 128 times what the codes of a group add up to. In two sums, for a dot product waits for the last one of its sum.
struct Offset {
  I of_low[per_half], of_high[per_half];

  HALFBYTE_INLINE Offset() {
#pragma GCC unroll 16
    for (int v = 0; v < per_half; ++v) of_low[v] = of_high[v] = set1_i(0);
  }
  HALFBYTE_INLINE void add(const I (&low)[per_half], const I (&high)[per_half]) {
    const I x = set1_i(static_cast<int32_t>(0x80808080u));
#pragma GCC unroll 16
    for (int v = 0; v < per_half; ++v) {
      dot4(of_low[v], x, low[v]);
      dot4(of_high[v], x, high[v]);
    }
  }
  HALFBYTE_INLINE I all(int v) const { return add_i(of_low[v], of_high[v]); }
};

// out[r][c] = the scaled sums of a half.
template <int rows>
void few_int4(const TileArgs& t, NibbleHalf h, float* out) {
  constexpr int chains = rows <= 4 ? 2 : 1;
  const int64_t ld = int64_t{t.panels} * panel_width;
  F y[rows][per_half];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < per_half; ++v) y[r][v] = set1(0);
  const auto* x = static_cast<const uint8_t*>(t.a);
  const uint8_t* ahead = h.pairs + weights_ahead;  // a half begins with these; the next one follows it
  for (int64_t left = t.quads; left > 0; left -= t.groups->quads, x += t.groups->quads * rows * 4) {
    I sum[chains][rows][per_half];
    Offset offset;
#pragma GCC unroll 16
    for (int v = 0; v < per_half; ++v) {
#pragma GCC unroll 24
      for (int r = 0; r < chains * rows; ++r) sum[r / rows][r % rows][v] = set1_i(0);
    }
    for (int i = *h.pairs++; i > 0; --i, h.index += 2, h.lines += half_panel * quad) {
      __builtin_prefetch(ahead);
      ahead += 64;
      I low[per_half], high[per_half];
      unpack(h.lines, low, high);
      offset.add(low, high);
      const uint8_t *const first = x + int64_t{h.index[0]} * (rows * 4), *const second = x + int64_t{h.index[1]} * (rows * 4);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const I a = broadcast_quad(first + r * 4), b = broadcast_quad(second + r * 4);
#pragma GCC unroll 16
        for (int v = 0; v < per_half; ++v) {
          dot4(sum[0][r][v], a, low[v]);
          dot4(sum[chains - 1][r][v], b, high[v]);
        }
      }
    }
#pragma GCC unroll 16
    for (int v = 0; v < per_half; ++v) {
      const F scale = load_scales(h, v);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        I all = sub_i(sum[0][r][v], offset.all(v));
        if constexpr (chains == 2) all = add_i(all, sum[1][r][v]);
        y[r][v] = fma(to_float(all), scale, y[r][v]);
      }
    }
    h.scales += h.scale_bytes;
    __builtin_prefetch(ahead);
    ahead += 64;
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < per_half; ++v) store<DType::f32>(out + r * ld + v * width, y[r][v]);
}

using FewInt4 = void (*)(const TileArgs&, NibbleHalf, float*);
template <int rows>
constexpr FewInt4 few_int4_or_none() {
  if constexpr (rows <= few_rows) return few_int4<rows>;
  return nullptr;
}
constexpr FewInt4 few_int4_tiles[12] = {
    few_int4_or_none<1>(), few_int4_or_none<2>(), few_int4_or_none<3>(), few_int4_or_none<4>(),  few_int4_or_none<5>(),
    few_int4_or_none<6>(), few_int4_or_none<7>(), few_int4_or_none<8>(), few_int4_or_none<9>(),  few_int4_or_none<10>(),
    few_int4_or_none<11>(), few_int4_or_none<12>()};

constexpr int64_t unpacked_quads = 256, most_groups = unpacked_quads / 8;

// Blocks of whole groups of a half.
struct Unpacked {
  alignas(64) uint8_t lines[unpacked_quads * half_panel * quad];
  alignas(64) int32_t offset[most_groups * half_panel];
  alignas(64) float scale[most_groups * half_panel];
  uint16_t index[unpacked_quads];  // from the first group on
  int pairs[most_groups];
  int groups;
};

// The next groups of h, which are `quads` long or, the last one, shorter.
inline void unpack_groups(const TileArgs& t, NibbleHalf& h, int64_t quads, Unpacked& to) {
  constexpr int line_bytes = half_panel * quad;
  uint8_t* line = to.lines;
  uint16_t* index = to.index;
  int groups = 0;
  for (int64_t first = 0; first < quads; first += t.groups->quads, ++groups) {
    Offset offset;
    for (int i = *h.pairs++; i > 0; --i, h.index += 2, h.lines += line_bytes, index += 2, line += 2 * line_bytes) {
      __builtin_prefetch(h.lines + weights_ahead);
      I low[per_half], high[per_half];
      unpack(h.lines, low, high);
      offset.add(low, high);
      for (int v = 0; v < per_half; ++v) {
        store_i(reinterpret_cast<int32_t*>(line) + v * width, low[v]);
        store_i(reinterpret_cast<int32_t*>(line + line_bytes) + v * width, high[v]);
      }
      index[0] = static_cast<uint16_t>(first + h.index[0]);
      index[1] = static_cast<uint16_t>(first + h.index[1]);
    }
    to.pairs[groups] = h.pairs[-1];
    for (int v = 0; v < per_half; ++v) {
      store_i(to.offset + groups * half_panel + v * width, sub_i(set1_i(0), offset.all(v)));
      store<DType::f32>(to.scale + groups * half_panel + v * width, load_scales(h, v));
    }
    h.scales += h.scale_bytes;
  }
  to.groups = groups;
}

// out[c][lane] (+)= the scaled sums, with rows in the lanes of `vectors` vectors.
template <int channels, int vectors>
void many_int4(const Unpacked& half, const uint8_t* strip, bool add, float* out) {
  constexpr int lanes = vectors * width;
  for (int first = 0; first < half_panel; first += channels) {
    F y[channels][vectors];
#pragma GCC unroll 16
    for (int c = 0; c < channels; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) y[c][v] = add ? load<DType::f32>(out + (first + c) * lanes + v * width) : set1(0);
    const uint8_t* line = half.lines + first * quad;
    const uint16_t* index = half.index;
    for (int g = 0; g < half.groups; ++g) {
      const int32_t* const offset = half.offset + g * half_panel + first;
      const float* const scale = half.scale + g * half_panel + first;
      I sum[channels][vectors];
#pragma GCC unroll 16
      for (int c = 0; c < channels; ++c)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[c][v] = set1_i(offset[c]);
      for (int i = half.pairs[g]; i > 0; --i) {
#pragma GCC unroll 2
        for (int second = 0; second < 2; ++second, line += half_panel * quad) {
          const uint8_t* const x = strip + int64_t{*index++} * (lanes * 4);
          I a[vectors];
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) a[v] = ByteUnits::vector(x + v * width * 4);
#pragma GCC unroll 16
          for (int c = 0; c < channels; ++c) {
            const I w = broadcast_quad(line + c * quad);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) dot4(sum[c][v], a[v], w);
          }
        }
      }
#pragma GCC unroll 16
      for (int c = 0; c < channels; ++c) {
        const F s = set1(scale[c]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) y[c][v] = fma(to_float(sum[c][v]), s, y[c][v]);
      }
    }
#pragma GCC unroll 16
    for (int c = 0; c < channels; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) store<DType::f32>(out + (first + c) * lanes + v * width, y[c][v]);
  }
}

template <int vectors>
constexpr int int4_channels = width == 8 ? (vectors == 1 ? 4 : 2) : vectors == 1 ? 8 : 4;
using ManyInt4 = void (*)(const Unpacked&, const uint8_t*, bool, float*);
constexpr ManyInt4 many_int4_tiles[4] = {many_int4<int4_channels<1>, 1>, many_int4<int4_channels<2>, 2>,
                                         many_int4<int4_channels<3>, 3>, many_int4<int4_channels<most_vectors>, most_vectors>};

[[maybe_unused]] void int4_block_tile(const TileArgs& t) {
  const auto panel = [&](int p) { return t.b + (t.panel_offsets[p] - t.panel_offsets[0]); };
  if (t.rows <= few_rows) {
    for (int p = 0; p < t.panels; ++p) {
      for (int h = 0; h < 2; ++h) {
        few_int4_tiles[t.rows - 1](t, nibble_half(t, panel(p), h), t.t + p * panel_width + h * half_panel);
      }
    }
    return;
  }
  const int64_t lanes = lanes_of(t.rows), of_panel = panel_width * lanes;
  alignas(64) float sums[max_panels * panel_width * block_mr];
  NibbleHalf halves[max_panels][2];
  for (int p = 0; p < t.panels; ++p) {
    for (int h = 0; h < 2; ++h) halves[p][h] = nibble_half(t, panel(p), h);
  }
  for (int64_t first = 0; first == 0 || first < t.quads; first += unpacked_quads) {
    const int64_t quads = t.quads - first < unpacked_quads ? t.quads - first : unpacked_quads;
    const uint8_t* const strip = static_cast<const uint8_t*>(t.a) + first * lanes * 4;
    for (int p = 0; p < t.panels; ++p) {
      for (int h = 0; h < 2; ++h) {
        Unpacked half;
        unpack_groups(t, halves[p][h], quads, half);
        many_int4_tiles[lanes / width - 1](half, strip, first > 0, sums + p * of_panel + h * half_panel * lanes);
      }
    }
  }
  for (int p = 0; p < t.panels; ++p) {
    rows_of_channels(sums + p * of_panel, lanes, panel_width, t.rows, t.t + p * panel_width, int64_t{t.panels} * panel_width);
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
