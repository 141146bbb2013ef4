// A packed weight as a matrix of 16-bit floats: argument checks and the launch.
#include "cuda/dequantize.cuh"

#include <bit>

#include "cuda/kernels.h"

namespace halfbyte::cuda {
namespace {

int check(const halfbyte_cuda_dequantize& c) {
  const halfbyte_cuda_format& f = c.format;
  const bool groups = f.group == 32 || f.group == 64 || f.group == 128;
  if ((f.bits != 4 && f.bits != 8) || (f.group && !groups) || (groups && f.scale_bytes != 2 && f.scale_bytes != 4) ||
      (f.offsets && !groups) || c.n < 0 || c.k < 0 || c.k % 8 || (c.n > 1 && c.ldy < c.k) ||
      (c.y_type != HALFBYTE_BF16 && c.y_type != HALFBYTE_F16)) {
    return HALFBYTE_CUDA_BAD_ARGUMENT;
  }
  if (c.n == 0 || c.k == 0) return 0;
  if (!c.weight || !c.scale || !c.y) return HALFBYTE_CUDA_BAD_ARGUMENT;
  const bool aligned = rows_aligned(c.weight, 0, 1, 1, 16) && rows_aligned(c.scale, 0, 1, 4, 4) &&
                       rows_aligned(c.y, c.ldy, c.n, 2, 16);
  return aligned ? 0 : HALFBYTE_CUDA_ALIGNMENT;
}

}  // namespace

int dequantize_run(const halfbyte_cuda_dequantize& call, void* stream) {
  if (const int error = check(call); error || call.n == 0 || call.k == 0) return error;
  const WeightFormat f{call.format.bits, call.format.group, call.format.scale_bytes, call.format.offsets != 0};
  const int64_t tiles = n_tiles(call.n) * k_tiles(call.k);
  if (tiles > INT32_MAX) return HALFBYTE_CUDA_BAD_ARGUMENT;  // what a grid takes along x
  const int shift = f.group ? std::countr_zero(static_cast<unsigned>(f.group)) : -1;
  const DequantizeArgs args{call, static_cast<int>(k_tiles(call.k)), f.tile_bytes(), f.scales_at(), f.offsets_at(), shift};
  const Launch how{{tiles, 1, 1}, dequantize_threads, 0, 1, stream};
  return f.bits == 4 ? launch<dequantize_tiles<4>>(how, args) : launch<dequantize_tiles<8>>(how, args);
}

}  // namespace halfbyte::cuda
