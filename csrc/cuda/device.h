// What the kernels have to know of the GPU that they run on.
#pragma once

namespace halfbyte::cuda {

struct Device {
  int arch;          // compute capability, 10 * major + minor
  int processors;    // streaming multiprocessors
  int shared_bytes;  // most dynamic shared memory of a block
};

int device_count();                           // below 0: a cudaError_t, negated
int device_of(int index, Device& device);     // index -1: the current one; returns a cudaError_t, read once per device
const char* device_error(int cuda_error);

}  // namespace halfbyte::cuda
