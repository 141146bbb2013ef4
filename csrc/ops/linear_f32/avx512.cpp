// linear_f32 on AVX512: 12x32 tiles (24 sums, 2 weight vectors, 1 broadcast), and for few rows up to four panels side by
// side: an FMA has a latency of four cycles at two per cycle.
#include "simd/avx512.h"

#include "ops/linear_f32/kernel.h"
#include "ops/linear_f32/tile.h"

namespace halfbyte::avx512 {
namespace {

constexpr int mr = 12, accumulators = 12;

using TileFunction = void (*)(const TileArgs&);

// [rows - 1][panels - 1]; empty where the sums would not fit
constexpr TileFunction tiles[mr][max_panels] = {
    {tile<1, 2>, tile<1, 4>, tile<1, 6>, tile<1, 8>},
    {tile<2, 2>, tile<2, 4>, tile<2, 6>, tile<2, 8>},
    {tile<3, 2>, tile<3, 4>, tile<3, 6>, tile<3, 8>},
    {tile<4, 2>, tile<4, 4>, tile<4, 6>, nullptr},
    {tile<5, 2>, tile<5, 4>, nullptr, nullptr},
    {tile<6, 2>, tile<6, 4>, nullptr, nullptr},
    {tile<7, 2>, nullptr, nullptr, nullptr},
    {tile<8, 2>, nullptr, nullptr, nullptr},
    {tile<9, 2>, nullptr, nullptr, nullptr},
    {tile<10, 2>, nullptr, nullptr, nullptr},
    {tile<11, 2>, nullptr, nullptr, nullptr},
    {tile<12, 2>, nullptr, nullptr, nullptr},
};

void run_tile(const TileArgs& t) { tiles[t.rows - 1][t.panels - 1](t); }

}  // namespace
}  // namespace halfbyte::avx512

namespace halfbyte::linear_f32 {

constinit const GemmKernel kernel_avx512 = {
    .info = {"linear_f32_12x32x1_avx512", "avx512", isa_avx512},
    .wide = false,
    .grain = 1 << 17,
    .grouped = {avx512::mr, avx512::mr, 1, avx512::accumulators, avx512::run_tile},
    .epilogue = avx512::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::linear_f32
