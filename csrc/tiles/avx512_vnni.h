// Tiles of weights in groups on AVX512-VNNI: 6x32, and for few rows up to four panels side by side, because vpdpbusd has a
// latency of 4-5 cycles at one or two per cycle and 1x32 would have two chains only.
//   8-bit activations    12 integer sums, 12 scaled ones, 2 weight vectors, 1 broadcast, 1 mask: 28 of 32 registers; where
//                        sums are more (7 or 8 rows alone, 4x64), the scaled ones stay in L1
//   16-bit activations   24 integer sums (high and low parts); the scaled ones stay in L1
//
// Nibbles cost two ANDs a line, on other pipes than the multiplier's: the high ones stay where they are and count 16 times.
// A group's sums are converted and added to t by one FMA each, which takes the place of a vpdpbusd: 12 in 108 for groups of
// 32. Measured alone in L1 on Zen 5: 81 % of the peak with groups of 32, 95 % of 128; 12x32 tiles with t in L1, 74 and 94 %;
// a product and an addition in place of the FMA, 75 and 93 %.
#pragma once
#include "simd/avx512.h"

#include "simd/epilogue.h"
#include "simd/vnni512.h"

namespace halfbyte::avx512_vnni {
namespace {

constexpr int unroll = 8;  // a group has a multiple of 8 quads

// How far ahead of the multiplication a panel is fetched; see ops/linear_w8a8/avx512_vnni.cpp.
constexpr int prefetch_bytes = 16 * 1024;

// A line of 32 channels x 4 k as two vectors of unsigned bytes. shift: the stored zero of either is 1 << shift.
struct Bytes {
  static constexpr int line = byte_line, low_shift = 7, high_shift = 7;
  static HALFBYTE_INLINE void load(const uint8_t* p, I& low, I& high) {
    low = _mm512_loadu_si512(p);
    high = _mm512_loadu_si512(p + 64);
  }
};
struct Nibbles {
  static constexpr int line = byte_line / 2, low_shift = 3, high_shift = 7;
  static HALFBYTE_INLINE void load(const uint8_t* p, I& low, I& high) {
    const I x = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(0x0f);
    low = _mm512_and_si512(x, mask);
    high = _mm512_andnot_si512(mask, x);
  }
};
struct Nf4 {
  static constexpr int line = byte_line / 2, low_shift = 7, high_shift = 7;
  static HALFBYTE_INLINE void load(const uint8_t* p, I& low, I& high) {
    const I x = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(0x0f);
    const __m128i signed_levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(nf4_levels));
    const I levels = _mm512_broadcast_i32x4(_mm_xor_si128(signed_levels, _mm_set1_epi8(-128)));  // + 128
    low = _mm512_shuffle_epi8(levels, _mm512_and_si512(x, mask));
    high = _mm512_shuffle_epi8(levels, _mm512_and_si512(_mm512_srli_epi16(x, 4), mask));
  }
};

HALFBYTE_INLINE F load_factors(const uint8_t* p, int bytes, int v) {
  return bytes == 128 ? load<DType::f32>(p + v * 64) : load<DType::f16>(p + v * 32);
}

// parts: int8 codes per activation. per_group: activations have a scale per group.
template <class Weights, int parts, bool per_group, int rows, int panels>
void tile_of(const TileArgs& t) {
  constexpr int vectors = 2 * panels, bases = (rows + 2) / 3;
  const GroupFormat format = *t.groups;
  const int64_t lda = t.lda, panel_bytes = t.panel_bytes;
  const int header_bytes = format.bytes();
  // Rows three by three: base, base + lda and base + 2 lda are addressing modes, so 12 rows take four pointers and no
  // spill. The empty asm keeps gcc from deriving the pointers from one another again.
  const int8_t* a[parts][bases];
#pragma GCC unroll 4
  for (int i = 0; i < bases; ++i) {
    a[0][i] = static_cast<const int8_t*>(t.a) + 3 * i * lda;
    asm("" : "+r"(a[0][i]));
  }
  constexpr bool in_registers = parts == 1 && rows * panels <= 6;  // t
  F y[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      if constexpr (in_registers) {
        y[r][v] = set1(0);
      } else {
        store<DType::f32>(t.t + (r * vectors + v) * width, set1(0));
      }
    }
  const uint8_t* b = t.b;
  for (int64_t g = 0, left = t.quads; left > 0; ++g, left -= format.quads) {
    const int64_t quads = left < format.quads ? left : format.quads;
    const uint8_t* const header = b;
    const int32_t* const a_sum = t.a_sum + g * parts;
    I acc[parts][rows][vectors];
    // Minus the zero point times the sum of the activations, to begin with.
    if (format.zero_bytes) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const uint8_t* const zeros = header + format.scale_bytes + (v / 2) * panel_bytes + (v % 2) * 32;
        const I zero = load_i16(reinterpret_cast<const int16_t*>(zeros));
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
          for (int p = 0; p < parts; ++p) {
            acc[p][r][v] = sub_i(set1_i(0), mul_i(zero, set1_i(a_sum[r * t.sum_stride + p])));
          }
      }
    } else if (Weights::low_shift == 3 && format.minimum_bytes) {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
#pragma GCC unroll 2
          for (int p = 0; p < parts; ++p) acc[p][r][v] = set1_i(0);
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int p = 0; p < parts; ++p) {
          const I minus = sub_i(set1_i(0), set1_i(a_sum[r * t.sum_stride + p]));
#pragma GCC unroll 8
          for (int v = 0; v < vectors; v += 2) {
            acc[p][r][v] = shift_left<Weights::low_shift>(minus);
            acc[p][r][v + 1] = shift_left<Weights::high_shift>(minus);
          }
        }
    }
    if constexpr (parts == 2) {
#pragma GCC unroll 2
      for (int i = 0; i < bases; ++i) {
        a[1][i] = a[0][i] + quads * quad;
        asm("" : "+r"(a[1][i]));
      }
    }
    b += header_bytes;
    for (int64_t q = 0; q < quads; q += unroll) {
#pragma GCC unroll 8
      for (int u = 0; u < unroll; ++u) {
#pragma GCC unroll 4
        for (int panel = 0; panel < panels; ++panel) {
          I low, high;
          Weights::load(b + panel * panel_bytes + u * Weights::line, low, high);
#pragma GCC unroll 8
          for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
            for (int p = 0; p < parts; ++p) {
              const I x = broadcast_quad(a[p][r / 3] + (r % 3) * lda + u * quad);
              dot4(acc[p][r][2 * panel], low, x);
              dot4(acc[p][r][2 * panel + 1], high, x);
            }
        }
      }
      if constexpr (panels <= 2) {
#pragma GCC unroll 2
        for (int panel = 0; panel < panels; ++panel)
#pragma GCC unroll 8
          for (int i = 0; i < unroll * Weights::line / 64; ++i) {
            const uint8_t* const ahead = b + panel * panel_bytes + prefetch_bytes + 64 * i;
            _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
          }
      }
      b += unroll * Weights::line;
#pragma GCC unroll 2
      for (int p = 0; p < parts; ++p)
#pragma GCC unroll 4
        for (int i = 0; i < bases; ++i) a[p][i] += unroll * quad;
    }
    if constexpr (parts == 2) {
#pragma GCC unroll 2
      for (int i = 0; i < bases; ++i) a[0][i] = a[1][i];
    }

#pragma GCC unroll 4
    for (int panel = 0; panel < panels; ++panel) {
      F scale[2] = {set1(1), set1(1)};
      if (format.scale_bytes) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) scale[v] = load_factors(header + panel * panel_bytes, format.scale_bytes, v);
      }
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const int at = 2 * panel + v;
          I sum = acc[0][r][at];
          if constexpr (parts == 2) sum = add_i(shift_left<8>(sum), acc[1][r][at]);
          F p = to_float(sum);
          F factor = scale[v];
          if constexpr (per_group) {
            if (format.scale_bytes) p = mul(p, factor);
            factor = set1(t.a_scale[r * t.scale_stride + g]);
          }
          if constexpr (in_registers) {
            y[r][at] = fma(p, factor, y[r][at]);
          } else {
            float* const to = t.t + (r * vectors + at) * width;
            store<DType::f32>(to, fma(p, factor, load<DType::f32>(to)));
          }
        }
      }
    }
    if (format.minimum_bytes) {
      const uint8_t* const minima = header + format.scale_bytes + format.zero_bytes;
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const int32_t* const sums = a_sum + r * t.sum_stride;
        F s = set1(static_cast<float>(parts == 2 ? 256 * sums[0] + sums[parts - 1] : sums[0]));
        if constexpr (per_group) s = mul(s, set1(t.a_scale[r * t.scale_stride + g]));
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          const F minimum = load_factors(minima + (v / 2) * panel_bytes, format.minimum_bytes, v % 2);
          if constexpr (in_registers) {
            y[r][v] = fma(s, minimum, y[r][v]);
          } else {
            float* const to = t.t + (r * vectors + v) * width;
            store<DType::f32>(to, fma(s, minimum, load<DType::f32>(to)));
          }
        }
      }
    }
  }
  if constexpr (in_registers) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) store<DType::f32>(t.t + (r * vectors + v) * width, y[r][v]);
  }
}

constexpr int mr = 6, alone = 8;
constexpr int accumulators = 8, wide_accumulators = 6;  // 16-bit activations take two registers for each

using TileFunction = void (*)(const TileArgs&);

template <class Weights, int parts, bool per_group, int rows, int panels>
constexpr TileFunction tile_if_it_fits() {
  constexpr int most = parts == 2 ? wide_accumulators : panels == 1 ? alone : accumulators;
  if constexpr (rows * panels <= most) {
    return tile_of<Weights, parts, per_group, rows, panels>;
  } else {
    return nullptr;
  }
}

template <class Weights, int parts, bool per_group>
void tile_in_groups(const TileArgs& t) {
#define TILE(rows, panels) tile_if_it_fits<Weights, parts, per_group, rows, panels>()
#define TILES(rows) {TILE(rows, 1), TILE(rows, 2), TILE(rows, 3), TILE(rows, 4)}
  static constexpr TileFunction tiles[alone][max_panels] = {TILES(1), TILES(2), TILES(3), TILES(4),
                                                            TILES(5), TILES(6), TILES(7), TILES(8)};
#undef TILES
#undef TILE
  tiles[t.rows - 1][t.panels - 1](t);
}

template <class Weights>
void tile_a8(const TileArgs& t) {
  return t.a_scale ? tile_in_groups<Weights, 1, true>(t) : tile_in_groups<Weights, 1, false>(t);
}
template <class Weights>
void tile_a16(const TileArgs& t) {
  return tile_in_groups<Weights, 2, true>(t);
}

}  // namespace
}  // namespace halfbyte::avx512_vnni
