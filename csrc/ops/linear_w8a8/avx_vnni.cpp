// linear_w8a8 on AVX-VNNI (VEX encoded, 256 bit): 6x16 tiles, 12 accumulators + 2 weights + 1 broadcast of the 16
// registers; a panel of 32 channels is walked in two halves (in one for one to three rows).
#include "simd/avx2.h"

#include "ops/linear_w8a8/kernel.h"
#include "simd/epilogue.h"
#include "simd/vnni256.h"

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

void tile(const TileArgs& t) {
  switch (t.rows) {
    case 1: return tile_part<1, 4, 2>(t, t.b, t.acc);
    case 2: return tile_part<2, 4, 1>(t, t.b, t.acc);
    case 3: return tile_part<3, 4, 1>(t, t.b, t.acc);
    case 4: return tile_halves<4>(t);
    case 5: return tile_halves<5>(t);
    default: return tile_halves<6>(t);
  }
}

}  // namespace
}  // namespace halfbyte::avx_vnni

namespace halfbyte::linear_w8a8 {

constinit const GemmKernel kernel_avx_vnni = {
    .info = {"linear_w8a8_6x32x4_avx_vnni", "avx_vnni", isa_avx_vnni},
    .mr = avx_vnni::mr,
    .row_step = 1,
    .wide = false,
    .accumulators = 1,
    .grain = 1 << 18,
    .tile = avx_vnni::tile,
    .epilogue = avx_vnni::epilogue,
};

}  // namespace halfbyte::linear_w8a8
