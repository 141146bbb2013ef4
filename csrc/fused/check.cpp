// What a stack of blocks and a call of it must fulfil.
#include <cmath>

#include "core/check.h"
#include "fused/stack.h"

namespace halfbyte::fused {
namespace {

void check_linear(const Linear& linear, const char* name, size_t block, int64_t n, int64_t k) {
  check(linear.packed != nullptr, "stack: block ", block, " has no ", name);
  check(linear.packed->n == n && linear.packed->k == k, "stack: ", name, " of block ", block, " is ", linear.packed->n, "x",
        linear.packed->k, "; it must be ", n, "x", k);
  if (linear.static_scale == 0) return;
  check(linear.static_zero >= -128 && linear.static_zero <= 127, "stack: the static zero point of ", name, " of block ", block,
        " is ", linear.static_zero, "; it must lie in [-128, 127]");
  check(linear.packed->format.activation_group == 0, "stack: ", name, " of block ", block,
        " has activation scales per group; a static scale is per tensor");
  check(std::isfinite(linear.static_scale) && linear.static_scale >= 0x1p-100f, "stack: the static scale of ", name,
        " of block ", block, " is ", linear.static_scale, "; it must be finite and at least 2^-100");
}

}  // namespace

void check_stack(const Stack& s) {
  check(s.hidden > 0 && s.heads > 0 && s.kv_heads > 0 && s.head_size > 0, "stack: hidden ", s.hidden, ", heads ", s.heads,
        ", key heads ", s.kv_heads, " and head size ", s.head_size, " must be positive");
  check(s.heads % s.kv_heads == 0, "stack: ", s.heads, " heads cannot share ", s.kv_heads, " key heads evenly");
  check(s.rotary_dims >= 0 && s.rotary_dims % 2 == 0 && s.rotary_dims <= s.head_size, "stack: rotary dims ", s.rotary_dims,
        " must be even and at most the head size ", s.head_size);
  check(s.window >= 0 && (s.window == 0 || s.causal), "stack: a window of ", s.window, " needs causal attention");
  check(std::isfinite(s.scale), "stack: the attention scale is ", s.scale);
  check(!s.blocks.empty(), "stack: there are no blocks");
  check(!s.first_norm || !s.pre_norm, "stack: a first norm belongs to post-norm blocks");
  check(!s.last_norm || s.pre_norm, "stack: a last norm belongs to pre-norm blocks");
  const int64_t q = int64_t{s.heads} * s.head_size, kv = int64_t{s.kv_heads} * s.head_size;
  for (size_t i = 0; i < s.blocks.size(); ++i) {
    const Block& b = s.blocks[i];
    check_linear(b.q, "q", i, q, s.hidden);
    check_linear(b.k, "k", i, kv, s.hidden);
    check_linear(b.v, "v", i, kv, s.hidden);
    check_linear(b.o, "o", i, s.hidden, q);
    check(b.up.packed != nullptr, "stack: block ", i, " has no up");
    const int64_t mlp = b.up.packed->n;
    check_linear(b.up, "up", i, mlp, s.hidden);
    check_linear(b.down, "down", i, s.hidden, mlp);
    if (b.gate.packed) check_linear(b.gate, "gate", i, mlp, s.hidden);
  }
}

void check_call(const Stack& s, const Call& call) {
  check(call.batch >= 0 && call.tokens >= 0, "stack: negative batch ", call.batch, " or tokens ", call.tokens);
  const int64_t rows = call.batch * call.tokens, count = static_cast<int64_t>(s.blocks.size());
  check(call.x_type != DType::i32 && call.out_type != DType::i32, "stack: x and the output are floats");
  check(rows == 0 || (call.x && call.out), "stack: x or the output have no memory");
  check(rows <= 1 || (call.ldx >= s.hidden && call.ldo >= s.hidden), "stack: rows overlap: strides ", call.ldx, " and ",
        call.ldo, " for ", s.hidden, " elements");
  check(call.first_block >= 0 && call.first_block < call.last_block && call.last_block <= count, "stack: blocks ",
        call.first_block, " to ", call.last_block, " of ", count);
  check(call.past >= 0, "stack: negative number of past tokens ", call.past);
  if (s.rotary_dims > 0) {
    check(call.cos && call.sin, "stack: the rotary embedding needs tables");
    for (int64_t r = 0; r < rows && call.positions; ++r) {
      check(call.positions[r] >= 0 && call.positions[r] < call.table_rows, "stack: position ", call.positions[r], " of row ", r,
            " is outside the rotary table of ", call.table_rows);
    }
    check(call.positions || call.past + call.tokens <= call.table_rows, "stack: positions up to ", call.past + call.tokens - 1,
          " are outside the rotary table of ", call.table_rows);
  }
  if (!call.cache) {
    check(call.past == 0, "stack: past tokens without a cache");
    return;
  }
  const Cache& c = *call.cache;
  check(c.k && c.v, "stack: the cache has no memory");
  check(call.past + call.tokens <= c.positions, "stack: the cache has room for ", c.positions, " tokens, not for ", call.past, " + ",
        call.tokens);
  check(c.type != attention::Storage::int8 || (c.k_scale && c.v_scale), "stack: an int8 cache needs scales");
}

}  // namespace halfbyte::fused
