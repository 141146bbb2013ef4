// One set of ceiling measurements per instruction set, declared from their list.
#pragma once
#include "core/kernel.h"

namespace halfbyte {

struct Ceiling {
  const char* isa;
  uint32_t needs;
  int64_t (*multiply_adds)(int64_t rounds);  // runs `rounds` rounds of register-only chains; returns int8 products done
  uint64_t (*read)(const void* data, int64_t bytes);  // reads every byte once; returns something that depends on them
};

#define KERNEL(isa) extern const Ceiling ceiling_##isa;
#include "ceiling/kernels.inc"
#undef KERNEL

}  // namespace halfbyte
