// Tiles of the linear ops on AVX-VNNI (VEX encoded, 256 bit): 6x16 tiles, 12 accumulators + 2 weights + 1 broadcast of the 16
// registers; a panel of 32 channels is walked in two halves (in one for one to three rows).
#pragma once
#include <string.h>

#include "simd/avx2.h"

#include "simd/epilogue.h"
#include "simd/vnni256.h"
#include "tiles/groups.h"

namespace halfbyte::avx_vnni {
namespace {

constexpr int mr = 6;

// `vectors` vectors of 8 channels from `b` on, stepping `step` quads at a time into separate accumulators: one row
// has too few chains otherwise (latency 4-5, two products per cycle).
template <int rows, int vectors, int steps>
void tile_part(const TileArgs& t, const uint8_t* b, int32_t* out) {
  const int8_t* a = static_cast<const int8_t*>(t.a);
  const int64_t lda = t.lda;
  I acc[steps][rows][vectors];
#pragma GCC unroll 2
  for (int s = 0; s < steps; ++s)
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[s][r][v] = _mm256_setzero_si256();

  for (int64_t q = 0; q < t.quads; q += steps) {
#pragma GCC unroll 2
    for (int s = 0; s < steps; ++s, a += quad, b += panel_width * quad) {
      I x[rows];
      if constexpr (rows <= 3) {
#pragma GCC unroll 3
        for (int r = 0; r < rows; ++r) x[r] = broadcast_quad(a + r * lda);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          const I w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b) + v);
#pragma GCC unroll 3
          for (int r = 0; r < rows; ++r) dot4(acc[s][r][v], w, x[r]);
        }
      } else {
        I w[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) w[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b) + v);
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
          x[r] = broadcast_quad(a + r * lda);
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) dot4(acc[s][r][v], w[v], x[r]);
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      I sum = acc[0][r][v];
      if constexpr (steps == 2) sum = add_i(sum, acc[1][r][v]);
      store_i(out + r * panel_width + v * width, sum);
    }
}

template <int rows>
void tile_halves(const TileArgs& t) {
  tile_part<rows, 2, 1>(t, t.b, t.acc);
  tile_part<rows, 2, 1>(t, t.b + 64, t.acc + 16);
}

void byte_sums(const TileArgs& t) {
  switch (t.rows) {
    case 1: return tile_part<1, 4, 2>(t, t.b, t.acc);
    case 2: return tile_part<2, 4, 1>(t, t.b, t.acc);
    case 3: return tile_part<3, 4, 1>(t, t.b, t.acc);
    case 4: return tile_halves<4>(t);
    case 5: return tile_halves<5>(t);
    default: return tile_halves<6>(t);
  }
}

// The same for nibbles: half a line is 32 bytes, channels c .. c+7 in the low and c+16 .. c+23 in the high halves.
template <int rows, int steps>
void nibble_part(const TileArgs& t, const uint8_t* b, int32_t* out) {
  const int8_t* a = static_cast<const int8_t*>(t.a);
  const int64_t lda = t.lda;
  const I low_mask = _mm256_set1_epi8(0x0f);
  I acc[steps][rows][2];
#pragma GCC unroll 2
  for (int s = 0; s < steps; ++s)
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) acc[s][r][0] = acc[s][r][1] = _mm256_setzero_si256();

  for (int64_t q = 0; q < t.quads; q += steps) {
#pragma GCC unroll 2
    for (int s = 0; s < steps; ++s, a += quad, b += byte_line / 2) {
      const I x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
      const I low = _mm256_and_si256(x, low_mask), high = _mm256_andnot_si256(low_mask, x);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        const I y = broadcast_quad(a + r * lda);
        dot4(acc[s][r][0], low, y);
        dot4(acc[s][r][1], high, y);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      I sum = acc[0][r][v];
      if constexpr (steps == 2) sum = add_i(sum, acc[1][r][v]);
      store_i(out + r * panel_width + v * 16, sum);
    }
}

template <int rows, int steps>
void nibble_halves(const TileArgs& t) {
  nibble_part<rows, steps>(t, t.b, t.acc);
  nibble_part<rows, steps>(t, t.b + 32, t.acc + 8);
}

void int4_sums(const TileArgs& t) {
  switch (t.rows) {
    case 1: return nibble_halves<1, 2>(t);
    case 2: return nibble_halves<2, 2>(t);
    case 3: return nibble_halves<3, 2>(t);
    case 4: return nibble_halves<4, 1>(t);
    case 5: return nibble_halves<5, 1>(t);
    default: return nibble_halves<6, 1>(t);
  }
}

void weight_only_sums(const TileArgs& t) { return t.nf4 ? nibble_sums<byte_sums, mr, int8_t>(t) : int4_sums(t); }

constexpr auto bytes_a8 = tile_in_groups<byte_sums, 8, 1, mr, int8_t>;
constexpr auto bytes_a16 = tile_in_groups<byte_sums, 8, 2, mr, int8_t>;
constexpr auto nibbles_a8 = tile_in_groups<int4_sums, 4, 1, mr, int8_t>;
constexpr auto nibbles_a16 = tile_in_groups<weight_only_sums, 4, 2, mr, int8_t>;

}  // namespace
}  // namespace halfbyte::avx_vnni
