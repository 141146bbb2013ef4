// The switch between two stacks, and the stacks themselves.
#include "cuda/emulated/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#ifdef HALFBYTE_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __x86_64__
// Saves what a function must keep for its caller, and returns on another stack. (swapcontext makes two system calls.)
extern "C" void halfbyte_cuda_switch_stack(void** from, void* to);
asm(R"(
    .text
    .globl halfbyte_cuda_switch_stack
    .hidden halfbyte_cuda_switch_stack
    .type halfbyte_cuda_switch_stack, @function
halfbyte_cuda_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size halfbyte_cuda_switch_stack, . - halfbyte_cuda_switch_stack
)");
#endif

namespace halfbyte::cuda::emulated {
namespace {

#ifdef HALFBYTE_ADDRESS_SANITIZER
constexpr size_t stack_bytes = 256 * 1024;  // its frames are several times as large
#else
constexpr size_t stack_bytes = 64 * 1024;
#endif

// Mapped in pieces, each stack above a page that faults; the kernel gives memory to what is touched.
class Stacks {
 public:
  ~Stacks() {
    for (char* piece : pieces_) munmap(piece, of_piece * stack_bytes);
  }
  char* operator[](size_t index) {
    while (index / of_piece >= pieces_.size()) map();
    return pieces_[index / of_piece] + index % of_piece * stack_bytes;
  }
  static size_t page() {
    static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
  }

 private:
  static constexpr size_t of_piece = 64;
  void map() {
    void* piece = mmap(nullptr, of_piece * stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (piece == MAP_FAILED) {
      std::fputs("halfbyte emulated GPU: no memory for stacks\n", stderr);
      std::abort();
    }
    pieces_.push_back(static_cast<char*>(piece));
    for (size_t i = 0; i < of_piece; ++i) mprotect(pieces_.back() + i * stack_bytes, page(), PROT_NONE);
  }
  std::vector<char*> pieces_;
};

thread_local Stacks stacks;
#ifdef HALFBYTE_ADDRESS_SANITIZER
thread_local Fiber* left = nullptr;  // by the latest switch
#endif

}  // namespace

void fiber_prepare(Fiber& fiber, size_t index, void (*entry)()) {
  char* const end = stacks[index] + stack_bytes;
  char* const begin = stacks[index] + Stacks::page();
  // Stacks begin in different sets of the caches: those of a warp's lanes are used in turn, at the same depth.
  char* const top = end - index * 9 % 64 * 64;
  fiber.stack = begin;
  fiber.stack_bytes = static_cast<size_t>(top - begin);
  fiber.fake_stack = nullptr;
#ifdef HALFBYTE_ADDRESS_SANITIZER
  __asan_unpoison_memory_region(begin, static_cast<size_t>(end - begin));
#endif
#ifdef __x86_64__
  // As after halfbyte_cuda_switch_stack's pushes; an entry expects its return address 8 bytes below a multiple of 16.
  void** const frame = reinterpret_cast<void**>(top) - 8;
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = frame;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = begin;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void fiber_entered() {
#ifdef HALFBYTE_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(nullptr, &left->stack, &left->stack_bytes);
#endif
}

void fiber_switch(Fiber& from, Fiber& to, [[maybe_unused]] bool leave_for_good) {
#ifdef HALFBYTE_ADDRESS_SANITIZER
  left = &from;
  __sanitizer_start_switch_fiber(leave_for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef __x86_64__
  halfbyte_cuda_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#ifdef HALFBYTE_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(from.fake_stack, &left->stack, &left->stack_bytes);
#endif
}

}  // namespace halfbyte::cuda::emulated
