// attention: softmax(scale q k' + mask) v per query and head, in one pass over the keys (online softmax).
//
//   t[d] = q[d] * f                    f = scale * log2(e), rounded to float32
//   s[j] = sum over d of t[d] k[j, d]  fma in the order of d, from 0
//   s[j] = s[j] + b[j]                 with an additive mask: b = mask * log2(e), at least -FLT_MAX where mask > -inf
//   s[j] = -inf                        where b[j] = -inf, a boolean mask is 0, or the position is ruled out:
//                                      causal: j > i + offset; window > 0: j <= i + offset - window
//
// Keys are walked in blocks of key_block, counted from key 0. Per block, from m = -FLT_MAX, l = 0, o = 0:
//
//   m' = max(m, s[j] of the block), c = 2^(m - m'), p[j] = 2^(s[j] - m')
//   l  = fma(l, c, sum of p)           the sum as simd/sum16.h has it, key j of the block being element j
//   o[d] = o[d] * c, then fma(p[j], v[j, d], o[d]) in the order of j
//
// and out[d] = o[d] * (1 / l), rounded to the output's type; 0 where l = 0: a query that may see no key gives zeros.
// k and v are read as float32: bf16 and f16 exactly, int8 as code * scale, one rounding. 2^x is a polynomial with a
// relative error below 3u, u = 2^-24, and 2^0 = 1; below x = -126.5 it is 0.
//
// A query's result depends on its own q, k, v, mask and position only, bit for bit: not on the instruction set, the
// number of threads, the other queries of the call, or whether a key is ruled out by a mask or absent at the end.
// So a token decoded on a cache equals that of a pass over the whole sequence.
//
// A NaN in q, in the additive mask, or in a key or value that the query may see gives NaN. Keys that are ruled out are
// not compared, but their values are multiplied by 0 where another query of the task sees them: v must be finite there.
//
// Error, with A[j] = sum over d of |q k scale|, P the exact weights, B = ceil(keys / key_block), first order in u:
//
//   |out - exact| <= (2 w + (keys + 6 B + 20) u) sum over j of P[j] |v[j]|  + half an ulp of the output's type
//   w = (head_size + 4) u max(A) + 3 u max(|mask|, |s|) + 3 u
//
// head_size + 4: the fma chain, f, q * f, code * scale of k. 3: mask * log2(e), the sum with it, s - m'. keys: the
// fma chain; B: o * c and the powers in c, which multiply l too; 20: the sum of p, 1 / l and their product.
#pragma once
#include "core/kernel.h"

namespace halfbyte::attention {

enum class Storage : int { f32 = 0, bf16 = 1, f16 = 2, int8 = 3 };  // of keys and values
enum class Mask : int { none = 0, add = 1, boolean = 2 };          // add: float32; boolean: bytes, nonzero = may see

// Strides count elements; the elements of a row (of head_size) lie side by side.
struct Args {
  int64_t batch, queries, keys;
  int heads, kv_heads, head_size;  // heads is a multiple of kv_heads: head h reads kv head h / (heads / kv_heads)
  const void* q;
  DType q_type;
  int64_t q_batch, q_row, q_head;
  const void *k, *v;
  Storage kv_type;
  int64_t k_batch, k_row, k_head, v_batch, v_row, v_head;
  const float *k_scale, *v_scale;  // int8: one per (batch, key, kv head); otherwise null
  int64_t k_scale_batch, k_scale_row, k_scale_head, v_scale_batch, v_scale_row, v_scale_head;
  float scale;
  bool causal;
  int64_t offset;  // of the queries' positions: query i stands at key i + offset; keys - queries for a cache
  int64_t window;  // keys that a query sees up to its position; 0: all
  const void* mask;
  Mask mask_kind;
  int64_t mask_batch, mask_head, mask_row, mask_key;  // 0: the same for all
  void* out;
  DType out_type;
  int64_t out_batch, out_row, out_head;
};

constexpr int key_block = 64;

// A task is up to this many (query, head) pairs of one sequence whose heads share a kv head, in the order of queries,
// heads innermost: each key and value that is read serves all of them.
constexpr int task_rows = 64;

struct Kernel {
  KernelInfo info;
  // scratch: scratch_bytes() of the thread's own, aligned to 64. Tasks may run in any order, on any threads.
  void (*task)(const Args& args, int64_t index, void* scratch);
};

#define KERNEL(isa) extern const Kernel kernel_##isa;
#include "ops/attention/kernels.inc"
#undef KERNEL

const Kernel& select();  // for the calling thread, now

void check_args(const Args& args);  // throws std::invalid_argument
int64_t tasks(const Args& args);
int64_t scratch_bytes(const Args& args);

// All tasks, on up to `threads` threads (0: default). Throws std::invalid_argument.
void run(const Args& args, int threads);

}  // namespace halfbyte::attention
