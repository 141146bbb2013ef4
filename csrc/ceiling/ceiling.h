// The ceilings that benchmarks compare with, measured on this machine: integer multiply-add throughput per instruction
// set, and read bandwidth.
#pragma once
#include <cstdint>
#include <string>

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

// int8 operations per second (two per product) on `threads` threads over about `seconds`.
double measure_peak(const std::string& isa, int threads, double seconds);
// Bytes per second read from a buffer of `bytes`, split over the threads, with the widest loads of this machine.
double measure_read(int64_t bytes, int threads, double seconds);

}  // namespace halfbyte
