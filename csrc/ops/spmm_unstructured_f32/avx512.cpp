// spmm_unstructured_f32 on AVX512: 128 rows. Up to four rows: of 16 k those that have a weight move together (vcompressps), into the
// lanes of the weights.
#include "simd/avx512.h"

#include "simd/epilogue.h"
#include "tiles/sparse/masks.h"

#include "ops/spmm_unstructured_f32/kernel.h"

namespace halfbyte::avx512 {
namespace {

constexpr int compressed_rows = 4;

template <int rows>
void compressed(const TileArgs& t) {
  const auto* const x = static_cast<const float*>(t.a);
  const int64_t k_padded = t.quads * quad, blocks = k_padded / window;
  MaskStream streams[max_panels];
  open_panels(t, streams);
  for (int p = 0; p < t.panels; ++p) {
    MaskStream& s = streams[p];
    alignas(64) float sums[panel_width][rows][width] = {};
    const float* value = s.values;
    for (int64_t b = 0; b < blocks; ++b, s.masks += panel_width, s.order += panel_width) {
      for (int i = 0; i < panel_width; ++i) {
        float(&to)[rows][width] = sums[s.order[i]];
        const uint64_t mask = s.masks[i];
        F sum[rows];
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) sum[r] = _mm512_load_ps(to[r]);
#pragma GCC unroll 4
        for (int part = 0; part < window / width; ++part) {
          const auto lanes = static_cast<__mmask16>(mask >> part * width);
          const F w = _mm512_loadu_ps(value);  // beyond the count, finite weights meet zeros
          value += __builtin_popcount(lanes);
#pragma GCC unroll 4
          for (int r = 0; r < rows; ++r) {
            F y = _mm512_loadu_ps(x + r * k_padded + b * window + part * width);
            asm("" : "+v"(y));  // from memory the instruction takes much longer
            sum[r] = fma(w, _mm512_maskz_compress_ps(lanes, y), sum[r]);
          }
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) _mm512_store_ps(to[r], sum[r]);
      }
    }
    for (int i = 0; i < panel_width; ++i) {
      for (int r = 0; r < rows; ++r) {
        t.t[(r * t.panels + p) * panel_width + i] = reduce_add(_mm512_load_ps(sums[i][r]));
      }
    }
  }
}

constexpr void (*compressed_tiles[compressed_rows])(const TileArgs&) = {compressed<1>, compressed<2>, compressed<3>, compressed<4>};

void mask_tile(const TileArgs& t) {
  if (t.all_rows <= compressed_rows) return compressed_tiles[t.rows - 1](t);
  mask_tiles[mask_lanes(t.rows) / width - 1](t);
}

void arrange(const ArrangeArgs& args) {
  if (args.all_rows > compressed_rows) return arrange_units<1, 0>(args, mask_lanes(args.rows));
  for (int r = 0; r < args.rows; ++r) {
    __builtin_memcpy(static_cast<float*>(args.strip) + r * args.k_padded, static_cast<const float*>(args.a) + r * args.lda,
                     static_cast<size_t>(args.k_padded) * sizeof(float));
  }
}

}  // namespace
}  // namespace halfbyte::avx512

namespace halfbyte::spmm_unstructured_f32 {

constinit const GemmKernel kernel_avx512 = {
    .info = {"spmm_unstructured_f32_128x1x1_avx512", "avx512", isa_avx512},
    .wide = false,
    .grain = 1 << 16,
    .grouped = {.mr = avx512::mask_mr, .alone = avx512::mask_mr, .row_step = avx512::width,
                .accumulators = max_panels * avx512::mask_mr, .run = avx512::mask_tile,
                .arrange = avx512::arrange, .strip_bytes = avx512::float_strip_bytes},
    .epilogue = avx512::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::spmm_unstructured_f32
