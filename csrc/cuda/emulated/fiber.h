// Fibers: stacks that one thread of the process switches between. The emulator has one for every CUDA thread.
#pragma once
#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define HALFBYTE_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HALFBYTE_ADDRESS_SANITIZER 1
#endif
#endif

namespace halfbyte::cuda::emulated {

struct Fiber {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t context{};
#endif
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's, while the fiber does not run
};

// `index`: which of the calling thread's stacks. They are kept until the thread ends.
void fiber_prepare(Fiber& fiber, size_t index, void (*entry)());
void fiber_entered();  // the first call of an entry
void fiber_switch(Fiber& from, Fiber& to, bool leave_for_good = false);

}  // namespace halfbyte::cuda::emulated
