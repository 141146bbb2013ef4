// A stack of transformer blocks, run by one call in one parallel region.
//
//   pre-norm    x += o(attention(qkv(norm(x))));  x += down(mlp(norm(x)))                  Llama, ViT
//   post-norm   x = norm(x + o(attention(qkv(x))));  x = norm(x + down(mlp(x)))            BERT
//
// where mlp is activation(up) or activation(gate) * up. Everything between the linears is float32. A block computes what its
// parts do when called one after the other: quantize_rows, linear_*, rope, attention, norm (see csrc/ops), whose bounds
// add up; no result depends on the number of threads.
#pragma once
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "core/linear.h"
#include "ops/attention/op.h"

namespace halfbyte::fused {

struct Linear {
  std::shared_ptr<const PackedWeight> packed;  // null: there is none
  const float* bias = nullptr;
  float static_scale = 0;  // of the activations; 0: dynamic
  int32_t static_zero = 0;
};

using Norm = norm::Parameters;

struct Block {
  Norm attention_norm, mlp_norm;
  Linear q, k, v, o, gate, up, down;
};

struct Stack {
  int64_t hidden;
  int heads, kv_heads, head_size;
  float scale;  // of the products of query and key
  bool pre_norm, causal;
  int64_t window;  // 0: none; keys that a query sees, itself included
  Activation activation;
  int rotary_dims;  // 0: no rotary embedding
  bool interleaved;
  std::optional<Norm> first_norm, last_norm;  // of x before the first block and after the last
  std::vector<Block> blocks;
};

// Throw std::invalid_argument where parts do not fit together.
void check_stack(const Stack& stack);
void check_call(const Stack& stack, const struct Call& call);

// Keys and values of the tokens so far: [block][batch][kv head][position][head_size]; strides in elements.
struct Cache {
  void *k, *v;
  attention::Storage type;
  int64_t block, batch, head, row;
  int64_t positions;         // that there is room for
  float *k_scale, *v_scale;  // int8: [block][batch][kv head][position]
  int64_t scale_block, scale_batch, scale_head;
};

// What a thread was doing when, for profiles.
struct Event {
  int32_t block, phase, rank;
  int64_t begin, end;  // ns
};
enum Phase : int32_t { phase_input, phase_qkv, phase_rope, phase_attention, phase_o, phase_up, phase_down, phase_output };
struct Timeline {
  Event* events;
  int64_t capacity;
  std::atomic<int64_t> count;  // may exceed capacity: those beyond are not kept
};

// Added to the products of queries and keys, or true where a query sees a key; strides in elements, 0 where all share.
struct Mask {
  const void* data;
  attention::Mask kind;
  int64_t batch, head, row, key;
};

struct Call {
  int64_t batch, tokens;
  const void* x;  // [batch * tokens][hidden]
  int64_t ldx;
  DType x_type;
  void* out;
  int64_t ldo;
  DType out_type;
  Mask mask;
  int64_t first_block, last_block;  // [first, last); first_norm goes with block 0, last_norm with the last of all
  const float *cos, *sin;           // [table_rows][rotary_dims / 2]
  int64_t table_rows;
  const int64_t* positions;  // [batch * tokens]; null: past, past + 1, ...
  const Cache* cache;        // null: none
  int64_t past;              // tokens in the cache; this call's follow them
  Timeline* timeline;        // may be null
  int threads;               // 0: default
};

// Throws std::invalid_argument before anything is written.
void run(const Stack& stack, const Call& call);

}  // namespace halfbyte::fused
