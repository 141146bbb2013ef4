// linear for few rows on any GPU since Ampere: tiles come by cp.async, sums of several blocks meet in memory.
#include "cuda/linear_dispatch.cuh"

namespace halfbyte::cuda {

namespace {

// Sums of the blocks that share k, in the workspace: [splits][sides][m][n, padded to tiles], 4 bytes each.
HALFBYTE_DEVICE int64_t place_in_workspace(const halfbyte_cuda_linear& call, int split, int side, int64_t m, int64_t n) {
  const int sides = call.gate ? 2 : 1;
  return ((static_cast<int64_t>(split) * sides + side) * call.m + m) * (n_tiles(call.n) * tile_n) + n;
}

class CopyByThreads {
 public:
  static constexpr int header_bytes = 0;

  HALFBYTE_DEVICE CopyByThreads(char*, char* ring, const LinearArgs& args, int, int lane)
      : ring_(shared_address(ring)), bytes_(args.tile_bytes), stages_(args.schedule.stages), lane_(lane),
        policy_(tile_policy()) {}

  // An empty group where there is nothing left to copy, so that `wait` can count groups.
  HALFBYTE_DEVICE void start(bool there, int stage, const uint8_t* from) {
    if (there) {
      for (int at = 16 * lane_; at < bytes_; at += 16 * 32) copy_async16(ring_ + stage * bytes_ + at, from + at, policy_);
    }
    copy_async_commit();
  }
  HALFBYTE_DEVICE void before_x() {}
  HALFBYTE_DEVICE void wait(int, int) {
    if (stages_ == 3) {
      copy_async_wait<2>();
    } else {
      copy_async_wait<1>();
    }
    warp_sync();
  }

  template <int bits, class Sum, class SumOf>
  HALFBYTE_DEVICE static void meet(const LinearArgs& args, int rows, int64_t m0, int64_t n0, SumOf sum_of) {
    const halfbyte_cuda_linear& call = args.call;
#pragma unroll 1
    for (int e = thread(); e < rows * tile_n; e += threads()) {
      const int64_t m = m0 + e / tile_n, n = n0 + e % tile_n;
      if (blocks_x() > 1) {
        Sum* workspace = static_cast<Sum*>(call.workspace);
        workspace[place_in_workspace(call, block_x(), 0, m, n)] = *sum_of(0, e);
        if (call.gate) workspace[place_in_workspace(call, block_x(), 1, m, n)] = *sum_of(1, e);
      } else if (n < call.n) {
        finish<bits, Sum>(call, *sum_of(0, e), call.gate ? *sum_of(1, e) : Sum{0}, m, n);
      }
    }
  }

 private:
  SharedAddress ring_;
  int bytes_, stages_, lane_;
  uint64_t policy_;
};

// The sums of all splits, in their order. Grid: rows, channels by 256.
template <int bits, class Sum>
HALFBYTE_KERNEL(256, 1)
linear_meet_kernel(const LinearArgs args) {
  const halfbyte_cuda_linear& call = args.call;
  const int64_t n = static_cast<int64_t>(block_y()) * threads() + thread(), m = block_x();
  if (n >= call.n) return;
  const Sum* workspace = static_cast<const Sum*>(call.workspace);
  Sum sums[2] = {0, 0};
  for (int side = 0; side < (call.gate ? 2 : 1); ++side) {
    for (int split = 0; split < args.schedule.splits; ++split) {
      sums[side] += workspace[place_in_workspace(call, split, side, m, n)];
    }
  }
  finish<bits, Sum>(call, sums[0], sums[1], m, n);
}

}  // namespace

int linear_sm80(const LinearArgs& args, void* stream) {
  if (int error = launch_linear<CopyByThreads>(args, 1, false, stream)) return error;
  if (args.schedule.splits == 1) return 0;
  const Launch how{{args.call.m, ceil_div(args.call.n, 256), 1}, 256, 0, 1, stream};
  if (args.call.x_type != HALFBYTE_I8 || args.call.format.group) return launch<linear_meet_kernel<8, float>>(how, args);
  if (args.call.format.bits == 8) return launch<linear_meet_kernel<8, int>>(how, args);
  return launch<linear_meet_kernel<4, int>>(how, args);
}

}  // namespace halfbyte::cuda
