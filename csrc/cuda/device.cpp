// What the CUDA runtime says of the devices, asked once for each.
#include "cuda/device.h"

#include <cuda_runtime.h>

#include <array>
#include <mutex>

namespace halfbyte::cuda {
namespace {

constexpr int most_devices = 64;

struct Known {
  std::once_flag once;
  cudaError_t error;
  Device device;
};

cudaError_t read(int index, Device& device) {
  const auto attribute = [&](cudaDeviceAttr name, int& value) { return cudaDeviceGetAttribute(&value, name, index); };
  int major = 0, minor = 0;
  if (cudaError_t e = attribute(cudaDevAttrComputeCapabilityMajor, major)) return e;
  if (cudaError_t e = attribute(cudaDevAttrComputeCapabilityMinor, minor)) return e;
  if (cudaError_t e = attribute(cudaDevAttrMultiProcessorCount, device.processors)) return e;
  if (cudaError_t e = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_bytes)) return e;
  device.arch = 10 * major + minor;
  return cudaSuccess;
}

}  // namespace

int device_count() {
  int count = 0, driver = 0;
  const cudaError_t e = cudaGetDeviceCount(&count);
  if (e == cudaSuccess) return count;
  cudaGetLastError();  // so that no later check finds it
  // Where there is no driver at all the runtime says that it is too old.
  if (e == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) return 0;
  return e == cudaErrorNoDevice || e == cudaErrorStubLibrary ? 0 : -static_cast<int>(e);
}

int device_of(int index, Device& device) {
  static std::array<Known, most_devices> known;
  if (index < 0) {
    if (cudaError_t e = cudaGetDevice(&index)) return e;
  }
  if (index >= most_devices) return read(index, device);
  Known& entry = known[index];
  std::call_once(entry.once, [&] { entry.error = read(index, entry.device); });
  device = entry.device;
  return entry.error;
}

const char* device_error(int cuda_error) { return cudaGetErrorString(static_cast<cudaError_t>(cuda_error)); }

}  // namespace halfbyte::cuda
