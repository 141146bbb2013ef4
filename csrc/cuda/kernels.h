// The kernels behind api.h, as host functions that check their arguments and launch. All return 0, a cudaError_t, or a
// halfbyte_cuda_status.
#pragma once
#include "cuda/api.h"
#include "cuda/launch.cuh"
#include "cuda/schedule.h"

namespace halfbyte::cuda {

// A call of the linear kernels with what follows from its format and its device.
struct LinearArgs {
  halfbyte_cuda_linear call;
  Schedule schedule;
  int tile_bytes, scales_at, offsets_at, group_shift;  // of a tile (layout.h); group = 1 << group_shift
  int k_tiles;
};

int linear_sm80(const LinearArgs& args, void* stream);
int linear_sm90(const LinearArgs& args, void* stream);
int rows_run(const halfbyte_cuda_rows& call, void* stream);
int finish_run(const halfbyte_cuda_finish& call, void* stream);
int dequantize_run(const halfbyte_cuda_dequantize& call, void* stream);

}  // namespace halfbyte::cuda
