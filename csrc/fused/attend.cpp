// The phases of a block between query, key and value and their use: rotary embedding, cache, attention.
#include "fused/runner.h"

namespace halfbyte::fused {
namespace {

int64_t size_of(attention::Storage type) {
  return type == attention::Storage::f32 ? 4 : type == attention::Storage::int8 ? 1 : 2;
}

}  // namespace

attention::Args describe_attention(const Stack& s, const Call& call, int64_t index, int64_t first, int64_t batch, float* qkv,
                                    float* out) {
  const int64_t width = qkv_width(s), sequence = call.tokens * width;
  attention::Args a{};
  a.batch = batch;
  a.queries = call.tokens;
  a.keys = call.cache ? call.past + call.tokens : call.tokens;
  a.heads = s.heads;
  a.kv_heads = s.kv_heads;
  a.head_size = s.head_size;
  a.q = qkv;
  a.q_batch = sequence;
  a.q_row = width;
  a.q_head = s.head_size;
  if (call.cache) {
    const Cache& c = *call.cache;
    const int64_t at = (index * c.block + first * c.batch) * size_of(c.type);
    a.k = static_cast<char*>(c.k) + at;
    a.v = static_cast<char*>(c.v) + at;
    a.kv_type = c.type;
    a.k_batch = a.v_batch = c.batch;
    a.k_row = a.v_row = c.row;
    a.k_head = a.v_head = c.head;
    if (c.type == attention::Storage::int8) {
      a.k_scale = c.k_scale + index * c.scale_block + first * c.scale_batch;
      a.v_scale = c.v_scale + index * c.scale_block + first * c.scale_batch;
      a.k_scale_batch = a.v_scale_batch = c.scale_batch;
      a.k_scale_head = a.v_scale_head = c.scale_head;
      a.k_scale_row = a.v_scale_row = 1;
    }
  } else {
    a.k = qkv + q_width(s);
    a.v = qkv + q_width(s) + kv_width(s);
    a.k_batch = a.v_batch = sequence;
    a.k_row = a.v_row = width;
    a.k_head = a.v_head = s.head_size;
  }
  a.scale = s.scale;
  a.causal = s.causal;
  a.offset = a.keys - a.queries;
  a.window = s.window;
  const Mask& m = call.mask;
  a.mask_kind = m.kind;
  if (m.data) a.mask = static_cast<const char*>(m.data) + first * m.batch * (m.kind == attention::Mask::boolean ? 1 : 4);
  a.mask_batch = m.batch;
  a.mask_head = m.head;
  a.mask_row = m.row;
  a.mask_key = m.key;
  a.out = out;
  a.out_batch = call.tokens * q_width(s);
  a.out_row = q_width(s);
  a.out_head = s.head_size;
  return a;
}

// Rotates queries and keys, and puts keys and values into the cache.
void Runner::append(int64_t index) {
  const int64_t width = qkv_width(stack), tokens = call.tokens;
  const Piece mine = piece(rows, team);
  rope::Args r{};
  r.head_size = stack.head_size;
  r.tokens = tokens;
  r.interleaved = stack.interleaved;
  r.cos = call.cos;
  r.sin = call.sin;
  r.table = call.table_rows;
  r.positions = call.positions ? call.positions + first_row : nullptr;
  r.first_position = call.past;
  const auto move = [&](float* from, int heads, rope::Heads to, int rotary_dims) {
    r.x = {from, DType::f32, tokens * width, width, stack.head_size};
    r.out = to.data ? to : r.x;
    r.heads = heads;
    r.rotary_dims = rotary_dims;
    if (to.data || rotary_dims > 0) kernels.rope.rows(r, mine.begin, mine.end);
  };
  float* const k = room.qkv + q_width(stack);
  float* const v = k + kv_width(stack);
  move(room.qkv, stack.heads, {}, stack.rotary_dims);
  if (!call.cache) return move(k, stack.kv_heads, {}, stack.rotary_dims);
  const Cache& c = *call.cache;
  const int64_t at = index * c.block + first * c.batch + call.past * c.row;
  if (c.type == attention::Storage::int8) {
    move(k, stack.kv_heads, {}, stack.rotary_dims);
    const int64_t scale_at = index * c.scale_block + first * c.scale_batch + call.past;
    store_codes(k, static_cast<int8_t*>(c.k) + at, c.k_scale + scale_at, mine);
    store_codes(v, static_cast<int8_t*>(c.v) + at, c.v_scale + scale_at, mine);
    return;
  }
  const DType type = static_cast<DType>(c.type);  // the float types have one numbering
  const int64_t bytes = at * size_of(c.type);
  move(k, stack.kv_heads, {static_cast<char*>(c.k) + bytes, type, c.batch, c.row, c.head}, stack.rotary_dims);
  move(v, stack.kv_heads, {static_cast<char*>(c.v) + bytes, type, c.batch, c.row, c.head}, 0);
}

// Rows of heads as int8 with a scale per position.
void Runner::store_codes(const float* from, int8_t* codes, float* scale, Piece mine) const {
  const Cache& c = *call.cache;
  int32_t sum;
  quantize_rows::Args a{};
  a.k = a.k_padded = a.ldc = stack.head_size;
  a.bits = 8;
  a.symmetric = true;
  a.sum = &sum;
  for (int64_t row = mine.begin; row < mine.end; ++row) {
    const int64_t sequence = row / call.tokens, token = row % call.tokens;
    for (int head = 0; head < stack.kv_heads; ++head) {
      a.x = from + row * qkv_width(stack) + head * stack.head_size;
      a.codes = codes + sequence * c.batch + token * c.row + head * c.head;
      a.scale = scale + sequence * c.scale_batch + head * c.scale_head + token;
      kernels.quantize.rows(a, 0, 1);
    }
  }
}

void Runner::attend(int64_t index) {
  const attention::Args a = describe_attention(stack, call, index, first, batch, room.qkv, room.h);
  const attention::Kernel& kernel = kernels.attention;
  shares.next_phase(team);
  shares.run(team, attention::tasks(a), [&](int64_t task) { kernel.task(a, task, scratch); });
  done(index, phase_attention);
}

}  // namespace halfbyte::fused
