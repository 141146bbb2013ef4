// The emulated device, and the function that chooses it.
#include "cuda/device.h"

#include <atomic>

#include "cuda/emulated/machine.h"

namespace halfbyte::cuda {
namespace {

std::atomic<int> arch{90}, processors{132}, shared_bytes{232448};  // an H100
std::atomic<unsigned> seed{0};

}  // namespace

int device_count() { return 1; }

int device_of(int index, Device& device) {
  if (index != -1 && index != 0) return 101;  // cudaErrorInvalidDevice
  device = {arch, processors, shared_bytes};
  return 0;
}

const char* device_error(int cuda_error) {
  switch (cuda_error) {
    case 0: return "no error";
    case 1: return "invalid argument";
    case 101: return "invalid device ordinal";
    default: return "unknown error";
  }
}

unsigned emulated::order_seed() { return seed; }

}  // namespace halfbyte::cuda

// seed: of the order in which clusters, warps and lanes run.
extern "C" __attribute__((visibility("default"))) void halfbyte_cuda_emulate(int arch, int processors, int shared_bytes,
                                                                              unsigned seed) {
  halfbyte::cuda::arch = arch;
  halfbyte::cuda::processors = processors;
  halfbyte::cuda::shared_bytes = shared_bytes;
  halfbyte::cuda::seed = seed;
}
