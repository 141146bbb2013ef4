// One kernel started on a stream, on the device or, emulated, on the CPU.
#pragma once
#include "cuda/ptx.cuh"

namespace halfbyte::cuda {

struct Launch {
  int64_t grid[3];
  int threads;
  int shared_bytes;
  int cluster = 1;  // blocks along x that run together and read each other's shared memory
  void* stream = nullptr;
  bool early = false;  // while the kernel before it still runs, where that lets it: programmatic dependent launch
};

}  // namespace halfbyte::cuda

#ifdef HALFBYTE_CUDA_EMULATED
#include "cuda/emulated/launch.h"
#else
#include <cuda_runtime.h>

#include <atomic>

namespace halfbyte::cuda {

// Both return a cudaError_t.

// Loads a kernel and lets it have all shared memory, once per device: nothing of this is left to a call that is captured in
// a graph.
template <auto kernel>
int prepare() {
  static std::atomic<uint64_t> prepared{0};  // a bit per device
  int device = 0;
  if (cudaError_t e = cudaGetDevice(&device)) return e;
  const uint64_t bit = uint64_t{1} << (device & 63);
  if (device < 64 && prepared.load(std::memory_order_relaxed) & bit) return 0;
  int most = 0;
  if (cudaError_t e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return e;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) return e;
  // Or a block may not find room beside one of a kernel for which the processor keeps little shared memory.
  const int all = cudaSharedmemCarveoutMaxShared;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, all)) return e;
  prepared.fetch_or(bit, std::memory_order_relaxed);
  return 0;
}

template <auto kernel, class Args>
int launch(const Launch& how, const Args& args) {
  if (int error = prepare<kernel>()) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(how.grid[0], how.grid[1], how.grid[2]);
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = static_cast<cudaStream_t>(how.stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (how.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = how.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (how.early) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace halfbyte::cuda
#endif
