// From the numbers of a call to an instance of linear_kernel.
#pragma once
#include "cuda/linear.cuh"

namespace halfbyte::cuda {

// All numbers of columns are prepared with the first: a graph is often captured of another number of rows than came before.
template <class Copy, int x_type, int bits, Has has>
int launch_linear(const LinearArgs& args, const Launch& how) {
  if (int error = prepare<linear_kernel<Copy, x_type, bits, 1, has>>()) return error;
  if (int error = prepare<linear_kernel<Copy, x_type, bits, 2, has>>()) return error;
  if (int error = prepare<linear_kernel<Copy, x_type, bits, 4, has>>()) return error;
  switch (args.schedule.columns) {
    case 1:
      return launch<linear_kernel<Copy, x_type, bits, 1, has>>(how, args);
    case 2:
      return launch<linear_kernel<Copy, x_type, bits, 2, has>>(how, args);
    default:
      return launch<linear_kernel<Copy, x_type, bits, 4, has>>(how, args);
  }
}

template <class Copy, int x_type, int bits>
int launch_linear(const LinearArgs& args, const Launch& how) {
  const auto& format = args.call.format;
  if constexpr (x_type == HALFBYTE_I8 && bits == 8) {
    if (format.pattern == two_of_four) return launch_linear<Copy, x_type, bits, Has::pairs>(args, how);
    if (format.pattern == blocks) return launch_linear<Copy, x_type, bits, Has::blocks>(args, how);
  }
  if (format.offsets) return launch_linear<Copy, x_type, bits, Has::offsets>(args, how);
  if (format.group) return launch_linear<Copy, x_type, bits, Has::groups>(args, how);
  return launch_linear<Copy, x_type, bits, Has::nothing>(args, how);
}

template <class Copy, int x_type>
int launch_linear(const LinearArgs& args, const Launch& how) {
  return args.call.format.bits == 4 ? launch_linear<Copy, x_type, 4>(args, how) : launch_linear<Copy, x_type, 8>(args, how);
}

template <class Copy>
int launch_linear(const LinearArgs& args, int cluster, bool early, void* stream) {
  const Schedule& s = args.schedule;
  const Launch how{{s.splits, ceil_div(args.call.m, s.rows()), n_tiles(args.call.n)},
                   32 * s.warps, shared_bytes(s, args.tile_bytes), cluster, stream, early};
  switch (args.call.x_type) {
    case HALFBYTE_F16:
      return launch_linear<Copy, HALFBYTE_F16>(args, how);
    case HALFBYTE_BF16:
      return launch_linear<Copy, HALFBYTE_BF16>(args, how);
    default:
      return launch_linear<Copy, HALFBYTE_I8>(args, how);
  }
}

}  // namespace halfbyte::cuda
