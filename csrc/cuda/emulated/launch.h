// A kernel's blocks, run on the calling thread of the process before launch() returns.
#pragma once
#include <type_traits>

#include "cuda/launch.cuh"

namespace halfbyte::cuda {
namespace emulated {

int run(const Launch& how, const char* name, void (*kernel)(const void* args), const void* args);

}  // namespace emulated

// Returns a cudaError_t, 1 (an invalid value) for every wrong size.
template <auto kernel>
int prepare() {
  return 0;
}

template <auto kernel, class Args>
int launch(const Launch& how, const Args& args) {
  static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) <= 4096);  // what a GPU takes
  return emulated::run(
      how, __PRETTY_FUNCTION__, [](const void* at) { kernel(*static_cast<const Args*>(at)); }, &args);
}

}  // namespace halfbyte::cuda
