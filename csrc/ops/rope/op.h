// rope: rotary position embedding. Each pair (a, b) of elements of a head turns by the angle of its position,
//
//   out_a = a * cos[p, i] - b * sin[p, i],   out_b = b * cos[p, i] + a * sin[p, i]      i = 0 .. rotary_dims / 2 - 1
//
// with p the position of the row. Pair i is (i, i + rotary_dims / 2), the halves of the head, or (2 i, 2 i + 1) where
// interleaved. Elements from rotary_dims on are copied. Each operation is one in float32, in the order written, without
// fma, then one rounding to the output's type. This is x * cos + rotate_half(x) * sin as transformers computes it, bit
// for bit in float32. Every kernel gives the same bits.
//
// Error against exact arithmetic on the float32 input and table: two rounded products and their sum, u = 2^-24, no
// underflow or overflow, |out^ - out| <= (1 + 2^-20) u (|a cos| + |b sin| + |out|).
#pragma once
#include "core/kernel.h"

namespace halfbyte::rope {

// A float matrix of heads. Row r is row r % tokens of batch r / tokens. Strides are elements; types f32, bf16 or f16.
struct Heads {
  void* data;
  DType type;
  int64_t batch_stride, row_stride, head_stride;
};

struct Args {
  Heads x;    // only read
  Heads out;  // may be x: of its type and strides then
  int64_t heads, head_size;
  int64_t tokens;       // rows per batch
  int64_t rotary_dims;  // even, at most head_size; 0: a copy, without table and positions
  bool interleaved;
  const float *cos, *sin;    // [table][rotary_dims / 2]
  int64_t table;             // positions in it
  const int64_t* positions;  // one per row; null: first_position + r % tokens
  int64_t first_position;
};

struct Kernel {
  KernelInfo info;
  void (*rows)(const Args& args, int64_t begin, int64_t end);  // trusts the positions
};

#define KERNEL(isa) extern const Kernel kernel_##isa;
#include "ops/rope/kernels.inc"
#undef KERNEL

const Kernel& select();  // for the calling thread, now

// m rows on up to `threads` threads (0: default). Throws std::invalid_argument and, for a position outside the table,
// std::out_of_range (IndexError in Python), both before anything is written.
void run(const Args& args, int64_t m, int threads);

}  // namespace halfbyte::rope
