// Tiles of blocks of 16 channels (core/sparse_panel.h) over the vector vocabulary, for float32 and int8 alike: both multiply
// units of 4 bytes. Included after a simd header.
//
// Few rows: channels in the lanes, a unit of activations broadcast to them: per block one vector of weights and a
// broadcast for each row. More rows: rows in the lanes, weights broadcast; 8 channels x 3 vectors of rows need 11 loads
// for 24 products, the other way round it would be 25, and a core loads no faster than it multiplies: 93 % of the
// peak of a Zen 5 against 60-75 %. A half is then walked twice, for 24 accumulators.
#pragma once
#include "core/sparse_panel.h"
#include "tiles/sparse/strips.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int per_half = half_panel / width;  // vectors of channels

struct FloatUnits {
  using Sum = F;
  using Index = uint32_t;
  static constexpr int codes_per_unit = 1, line_bytes = half_panel * 4;
  static HALFBYTE_INLINE F zero() { return set1(0); }
  static HALFBYTE_INLINE F load_sum(const void* p) { return load<DType::f32>(p); }
  static HALFBYTE_INLINE void store_sum(void* p, F x) { store<DType::f32>(p, x); }
  static HALFBYTE_INLINE F vector(const uint8_t* p) { return load<DType::f32>(p); }
  static HALFBYTE_INLINE F spread(const uint8_t* p) {
    float x;
    __builtin_memcpy(&x, p, 4);
    return set1(x);
  }
  static HALFBYTE_INLINE void multiply(F& sum, F activations, F weights) { sum = fma(activations, weights, sum); }
};

// Blocks of a half, ascending in k.
template <class Units>
struct List {
  const typename Units::Index* index;
  const uint8_t* lines;
  int64_t count;
};

// How far ahead of the multiplication a list is fetched, with few and with many rows. With many, weights of more than L2 come from L3
// or memory, and the hardware sees one line in a dozen loads: without, 4096x4096 float32 at 80 % zeros ran at half of the peak, and
// at 3/4 with half of this.
constexpr int lines_ahead = 32, weights_ahead = 4096;

// out[r][half * 16 + c] (+)= the products of the blocks of `halves` halves. ld: between rows of out. next: from here to the panel that
// comes next, where the lists lie about as here: its first lines are fetched at the end, for with few rows nothing but the weights
// takes time, and streams as short as these end before the hardware sees them.
template <class Units, int rows, int halves>
void few(const List<Units>* lists, const uint8_t* strip, bool add, float* out, int64_t ld, int64_t next) {
  typename Units::Sum sum[halves][rows][per_half];
#pragma GCC unroll 2
  for (int h = 0; h < halves; ++h)
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < per_half; ++v) {
        sum[h][r][v] = add ? Units::load_sum(out + r * ld + h * half_panel + v * width) : Units::zero();
      }
  const auto block = [&](const List<Units>& list, int64_t i, int64_t fetched, typename Units::Sum (&to)[rows][per_half])
                         __attribute__((always_inline)) {
    const uint8_t* const x = strip + int64_t{list.index[i]} * (rows * 4);
    typename Units::Sum w[per_half];
    __builtin_prefetch(list.lines + i * Units::line_bytes + fetched);
#pragma GCC unroll 16
    for (int v = 0; v < per_half; ++v) w[v] = Units::vector(list.lines + i * Units::line_bytes + v * width * 4);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const auto y = Units::spread(x + r * 4);
#pragma GCC unroll 16
      for (int v = 0; v < per_half; ++v) Units::multiply(to[r][v], y, w[v]);
    }
  };
  int64_t common = lists[0].count;
  if constexpr (halves == 2) common = lists[1].count < common ? lists[1].count : common;
  const int64_t own = common > lines_ahead ? common - lines_ahead : 0;  // fetch lines of this panel
  int64_t i = 0;
  for (int last = 0; last < 2; ++last) {
    const int64_t fetched = last ? next - own * Units::line_bytes : lines_ahead * Units::line_bytes;
    for (; i < (last ? common : own); ++i) {
      block(lists[0], i, fetched, sum[0]);
      if constexpr (halves == 2) block(lists[1], i, fetched, sum[1]);
    }
  }
#pragma GCC unroll 2
  for (int h = 0; h < halves; ++h) {
    for (i = common; i < lists[h].count; ++i) block(lists[h], i, next - own * Units::line_bytes, sum[h]);
  }
#pragma GCC unroll 2
  for (int h = 0; h < halves; ++h)
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < per_half; ++v) Units::store_sum(out + r * ld + h * half_panel + v * width, sum[h][r][v]);
}

// out[c][lane] (+)= the products of the blocks of a half, with rows in the lanes of `vectors` vectors.
template <class Units, int channels, int vectors>
void many(const List<Units>& list, const uint8_t* strip, bool add, float* out) {
  constexpr int lanes = vectors * width;
  for (int first = 0; first < half_panel; first += channels) {
    typename Units::Sum sum[channels][vectors];
#pragma GCC unroll 16
    for (int c = 0; c < channels; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        sum[c][v] = add ? Units::load_sum(out + (first + c) * lanes + v * width) : Units::zero();
      }
    for (int64_t i = 0; i < list.count; ++i) {
      const uint8_t* const x = strip + int64_t{list.index[i]} * (lanes * 4);
      const uint8_t* const line = list.lines + i * Units::line_bytes + first * 4;
      __builtin_prefetch(line + weights_ahead);
      typename Units::Sum y[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) y[v] = Units::vector(x + v * width * 4);
#pragma GCC unroll 16
      for (int c = 0; c < channels; ++c) {
        const auto w = Units::spread(line + c * 4);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) Units::multiply(sum[c][v], y[v], w);
      }
    }
#pragma GCC unroll 16
    for (int c = 0; c < channels; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) Units::store_sum(out + (first + c) * lanes + v * width, sum[c][v]);
  }
}

constexpr int most_vectors = width == 1 ? 4 : 3;   // of rows in a tile
constexpr int block_mr = most_vectors * width;
constexpr int channels_at_once = width == 16 ? 8 : 4;

// So much of a strip is used for all panels of a tile before the next part of it: weights stream through L2 meanwhile, and a strip of
// half of it would not stay (4096 float32 of 48 rows: 53 % of the peak, 85 % in parts).
constexpr int64_t strip_part = int64_t{256} << 10;

// The blocks of a panel as they lie, in parts of `units` along k.
template <class Units>
class PanelBlocks {
 public:
  static constexpr bool in_place = true;

  void open(const uint8_t* begin, int64_t units) {
    const BlockPanel& panel = *reinterpret_cast<const BlockPanel*>(begin);
    for (int h = 0; h < 2; ++h) {
      rest_[h] = {reinterpret_cast<const typename Units::Index*>(begin + panel.index[h]), begin + panel.lines[h], panel.count[h]};
    }
    units_ = units;
  }

  bool next(List<Units> (&lists)[2]) {
    if (end_ > 0 && rest_[0].count + rest_[1].count == 0) return false;
    end_ += units_;
    for (int h = 0; h < 2; ++h) {
      List<Units>& rest = rest_[h];
      int64_t count = 0, step = rest.count;  // blocks before end_: mostly all, or by bisection
      for (; step > 0; step = count == rest.count ? 0 : step / 2) {
        while (count + step <= rest.count && rest.index[count + step - 1] < end_) count += step;
      }
      lists[h] = {rest.index, rest.lines, count};
      rest = {rest.index + count, rest.lines + count * Units::line_bytes, rest.count - count};
    }
    return true;
  }

 private:
  List<Units> rest_[2];
  int64_t units_, end_ = 0;
};

template <class Units>
using TileOfLists = void (*)(const List<Units> (&lists)[2], const uint8_t* strip, bool add, float* out, int64_t ld,
                             int64_t next);

template <class Units, int rows>
void few_tile(const List<Units> (&lists)[2], const uint8_t* strip, bool add, float* out, int64_t ld, int64_t next) {
  if constexpr (width == 16) {
    few<Units, rows, 2>(lists, strip, add, out, ld, next);
  } else {
    few<Units, rows, 1>(lists, strip, add, out, ld, next);
    few<Units, rows, 1>(lists + 1, strip, add, out + half_panel, ld, next);
  }
}
template <class Units, int rows>
constexpr TileOfLists<Units> few_or_none() {
  if constexpr (rows <= few_rows) return few_tile<Units, rows>;
  return nullptr;
}
template <class Units>
constexpr TileOfLists<Units> few_tiles[12] = {
    few_or_none<Units, 1>(), few_or_none<Units, 2>(), few_or_none<Units, 3>(),  few_or_none<Units, 4>(),
    few_or_none<Units, 5>(), few_or_none<Units, 6>(), few_or_none<Units, 7>(),  few_or_none<Units, 8>(),
    few_or_none<Units, 9>(), few_or_none<Units, 10>(), few_or_none<Units, 11>(), few_or_none<Units, 12>()};

template <class Units, int vectors>
void many_tile(const List<Units> (&lists)[2], const uint8_t* strip, bool add, float* sums, int64_t, int64_t) {
  constexpr int channels = width == 16 && vectors == 1 ? 16 : channels_at_once;
  many<Units, channels, vectors>(lists[0], strip, add, sums);
  many<Units, channels, vectors>(lists[1], strip, add, sums + half_panel * vectors * width);
}
template <class Units>
constexpr TileOfLists<Units> many_tiles[4] = {many_tile<Units, 1>, many_tile<Units, 2>, many_tile<Units, 3>,
                                              many_tile<Units, most_vectors>};

// Source: opened where a panel begins, gives its blocks, list by list. out: [rows][panels * 32].
template <class Units, class Source>
HALFBYTE_INLINE void multiply_blocks(const TileArgs& t, float* out) {
  const auto* const strip = static_cast<const uint8_t*>(t.a);
  const int64_t lanes = lanes_of(t.rows), ld = int64_t{t.panels} * panel_width, size = panel_width * lanes;
  const bool is_few = t.rows <= few_rows;
  const TileOfLists<Units> tile = is_few ? few_tiles<Units>[t.rows - 1] : many_tiles<Units>[lanes / width - 1];
  alignas(64) float sums[max_panels * panel_width * block_mr];
  const int64_t units = strip_part / (lanes * 4);
  const auto panel = [&](int p) { return t.b + (t.panel_offsets[p] - t.panel_offsets[0]); };
  const auto next = [&](int p) -> int64_t { return Source::in_place ? t.panel_offsets[p + 1] - t.panel_offsets[p] : 0; };
  if (t.quads * quad / Units::codes_per_unit <= units) {  // all of the strip at once: sums of one panel, which stay in L1
    for (int p = 0; p < t.panels; ++p) {
      Source source;
      source.open(panel(p), units);
      List<Units> lists[2];
      float* const to = out + p * panel_width;
      for (bool add = false; source.next(lists); add = true) tile(lists, strip, add, is_few ? to : sums, ld, next(p));
      if (!is_few) rows_of_channels(sums, lanes, panel_width, t.rows, to, ld);
    }
    return;
  }
  Source sources[max_panels];
  for (int p = 0; p < t.panels; ++p) sources[p].open(panel(p), units);
  bool more = true;
  for (bool add = false; more; add = true) {
    more = false;
    for (int p = 0; p < t.panels; ++p) {
      List<Units> lists[2];
      if (!sources[p].next(lists)) continue;
      more = true;
      tile(lists, strip, add, is_few ? out + p * panel_width : sums + p * size, ld, next(p));
    }
  }
  for (int p = 0; p < t.panels && !is_few; ++p) {
    rows_of_channels(sums + p * size, lanes, panel_width, t.rows, out + p * panel_width, ld);
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
