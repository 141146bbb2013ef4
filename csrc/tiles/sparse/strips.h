// Strips of activations for sparse weights (core/gemm.h, ArrangeArgs): units of 4 bytes, which are four int8 codes or one float,
// with the units of all rows side by side: [unit][rows]. A kernel that jumps along k then finds all its rows in one or two cache
// lines, at addresses that one index makes. Of more than `few_rows` rows there are whole vectors of them, the last filled up
// with zeros: "lanes". Included after a simd header.
#pragma once
#include "core/gemm.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// Up to so many rows a tile has channels in the lanes of its vectors, and beyond it rows. At width 16 two halves of a panel go
// together, for an FMA has a latency of four cycles.
constexpr int few_rows = width == 16 ? 12 : width == 8 ? 6 : 1;

inline int64_t lanes_of(int rows) { return rows <= few_rows ? rows : (rows + width - 1) / width * width; }

// A strip of fewer rows is never larger. Behind it there is room for one vector more (lists.h).
inline int64_t strip_bytes_of(int64_t units, int rows) { return units * ((rows + width - 1) / width * width) * 4 + 64; }

// lanes: rows or more. flip: what is exclusive-ored to the codes.
template <int codes_per_unit, uint32_t flip>
void arrange_units(const ArrangeArgs& args, int64_t lanes) {
  const int64_t units = args.k_padded / codes_per_unit;
  const int64_t row_bytes = args.lda * 4 / codes_per_unit;
  const char* const a = static_cast<const char*>(args.a);
  float* const strip = static_cast<float*>(args.strip);
  if (lanes == 1) {  // nothing to transpose
    for (int64_t unit = 0; unit < units; unit += width) {
      F x = load<DType::f32>(a + unit * 4);
      if constexpr (flip != 0) x = from_bits(xor_i(bits(x), set1_i(static_cast<int32_t>(flip))));
      store<DType::f32>(strip + unit, x);
    }
    return;
  }
  for (int64_t first = 0; first < lanes; first += width) {
    const int count = args.rows - first < width ? static_cast<int>(args.rows - first) : width;
    const bool whole = lanes - first >= width;
    for (int64_t unit = 0; unit < units; unit += width) {
      F x[width];
#pragma GCC unroll 16
      for (int r = 0; r < width; ++r) {
        x[r] = r < count ? load<DType::f32>(a + (first + r) * row_bytes + unit * 4) : set1(0);
      }
      transpose(x);
#pragma GCC unroll 16
      for (int u = 0; u < width; ++u) {
        if constexpr (flip != 0) x[u] = from_bits(xor_i(bits(x[u]), set1_i(static_cast<int32_t>(flip))));
        float* const to = strip + (unit + u) * lanes + first;
        if (whole) {
          store<DType::f32>(to, x[u]);
        } else {
          store_n<DType::f32>(to, x[u], count);
        }
      }
    }
  }
}

[[maybe_unused]] int64_t float_strip_bytes(int rows, int64_t k_padded) { return strip_bytes_of(k_padded, rows); }

// sums [channels][lanes], a row for each channel -> out [rows][ld], a row for each row of activations. `channels` is a multiple
// of the width. The bits are moved as they are, of int32 too.
inline void rows_of_channels(const float* sums, int64_t lanes, int channels, int rows, float* out, int64_t ld) {
  for (int channel = 0; channel < channels; channel += width) {
    for (int first = 0; first < rows; first += width) {
      F x[width];
#pragma GCC unroll 16
      for (int c = 0; c < width; ++c) x[c] = load<DType::f32>(sums + (channel + c) * lanes + first);
      transpose(x);
#pragma GCC unroll 16
      for (int r = 0; r < width; ++r) {
        if (first + r < rows) store<DType::f32>(out + (first + r) * ld + channel, x[r]);
      }
    }
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
