// From the numbers of a call to an instance of linear_kernel.
#pragma once
#include "cuda/linear.cuh"

namespace halfbyte::cuda {

template <class Copy, int x_type, int bits, int columns>
int launch_linear(const LinearArgs& args, const Launch& how) {
  const auto& format = args.call.format;
  if constexpr (x_type == HALFBYTE_I8 && bits == 8) {
    if (format.pattern == two_of_four) return launch<linear_kernel<Copy, x_type, bits, columns, Has::pairs>>(how, args);
    if (format.pattern == blocks) return launch<linear_kernel<Copy, x_type, bits, columns, Has::blocks>>(how, args);
  }
  if (format.offsets) return launch<linear_kernel<Copy, x_type, bits, columns, Has::offsets>>(how, args);
  if (format.group) return launch<linear_kernel<Copy, x_type, bits, columns, Has::groups>>(how, args);
  return launch<linear_kernel<Copy, x_type, bits, columns, Has::nothing>>(how, args);
}

template <class Copy, int x_type, int bits>
int launch_linear(const LinearArgs& args, const Launch& how) {
  switch (args.schedule.columns) {
    case 1:
      return launch_linear<Copy, x_type, bits, 1>(args, how);
    case 2:
      return launch_linear<Copy, x_type, bits, 2>(args, how);
    default:
      return launch_linear<Copy, x_type, bits, 4>(args, how);
  }
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
