// linear for few rows on Hopper: tiles come by bulk copies, sums of several blocks meet within a cluster.
#include "cuda/linear_dispatch.cuh"

namespace halfbyte::cuda {

namespace {

class CopyInBulk {
 public:
  static constexpr int header_bytes = barrier_bytes;

  HALFBYTE_DEVICE CopyInBulk(char* shared, char* ring, const LinearArgs& args, int warp, int lane)
      : barriers_(shared_address(shared) + 8 * warp * args.schedule.stages), ring_(shared_address(ring)),
        bytes_(args.tile_bytes), lane_(lane), policy_(tile_policy()) {
    if (lane == 0) {
#pragma unroll 1
      for (int stage = 0; stage < args.schedule.stages; ++stage) barrier_init(barriers_ + 8 * stage, 1);
      barrier_init_fence();
      async_proxy_fence();
    }
    warp_sync();
  }

  HALFBYTE_DEVICE void start(bool there, int stage, const uint8_t* from) {
    if (!there || lane_ != 0) return;
    barrier_arrive_expect(barriers_ + 8 * stage, bytes_);
    copy_bulk(ring_ + stage * bytes_, from, bytes_, barriers_ + 8 * stage, policy_);
  }
  HALFBYTE_DEVICE void before_x() { wait_for_kernel_before(); }
  HALFBYTE_DEVICE void wait(int stage, int parity) {
    while (!barrier_try_wait(barriers_ + 8 * stage, parity)) {
    }
    warp_sync();
  }

  template <int bits, class Sum, class SumOf>
  HALFBYTE_DEVICE static void meet(const LinearArgs& args, int rows, int64_t m0, int64_t n0, SumOf sum_of) {
    const halfbyte_cuda_linear& call = args.call;
    const int blocks = blocks_x();  // the cluster
    auto total = [&](int side, int e) {
      if (blocks == 1) return *sum_of(side, e);
      Sum v = 0;
#pragma unroll 1
      for (int rank = 0; rank < blocks; ++rank) {
        const uint32_t there = load_cluster(shared_address(sum_of(side, e)), rank);
        if constexpr (is_integer<Sum>) {
          v += static_cast<int>(there);
        } else {
          v += bits_to_float(there);
        }
      }
      return v;
    };
    if (blocks > 1) {
      warp_sync();  // a cluster's barrier takes whole warps
      cluster_sync();
    }
#pragma unroll 1
    for (int e = block_x() * threads() + thread(); e < rows * tile_n; e += blocks * threads()) {
      const int64_t n = n0 + e % tile_n;
      if (n < call.n) finish<bits, Sum>(call, total(0, e), call.gate ? total(1, e) : Sum{0}, m0 + e / tile_n, n);
    }
    if (blocks > 1) {
      warp_sync();
      cluster_wait();  // a block's memory must last until all have read it
    }
  }

 private:
  SharedAddress barriers_, ring_;
  int bytes_, lane_;
  uint64_t policy_;
};

}  // namespace

int linear_sm90(const LinearArgs& args, void* stream) {
  return launch_linear<CopyInBulk>(args, args.schedule.splits, args.call.after_rows != 0, stream);
}

}  // namespace halfbyte::cuda
