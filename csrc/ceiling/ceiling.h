// The ceilings that benchmarks compare with, measured on this machine: integer multiply-add throughput per instruction
// set, and read bandwidth.
#pragma once
#include <cstdint>
#include <string>

namespace halfbyte {

// int8 operations per second (two per product) on `threads` threads over about `seconds`.
double measure_peak(const std::string& isa, int threads, double seconds);
// Bytes per second read from a buffer of `bytes`, split over the threads, with the widest loads of this machine.
double measure_read(int64_t bytes, int threads, double seconds);

}  // namespace halfbyte
