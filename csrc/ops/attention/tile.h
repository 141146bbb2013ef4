// A task of attention over the vector vocabulary of simd/: many rows with rows in lanes (many.h), few with keys in
// lanes (few.h). Included by each ISA file after its simd header and its constants:
//
//   nv                       vectors of a tile of many.h
//   key_spans, few_vectors   vectors of keys, and of features, of the tiles of few.h
//   most_few_rows            up to which few.h is faster, four rows at a time
#pragma once
#include "ops/attention/few.h"
#include "ops/attention/many.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// scratch_bytes() has room for this: 4 x padded(head) x 64 floats and what follows.
struct Memory {
  float *t, *o, *k, *v;  // [padded head][lanes] twice, [key_block][padded head] twice
  float *s, *bias;       // [key_block][lanes]
  float* bias_rows;      // [16][key_block]
  float* key_bias;       // [key_block]
  float *m, *l, *top, *decay, *begin, *end;  // [lanes]

  Memory(void* scratch, int64_t head_size) {
    float* next = static_cast<float*>(scratch);
    const auto take = [&](int64_t floats) {
      float* const p = next;
      next += floats;
      return p;
    };
    const int64_t head = padded(head_size);
    t = take(head * lanes), o = take(head * lanes);
    k = take(key_block * head), v = take(key_block * head);
    s = take(key_block * lanes), bias = take(key_block * lanes);
    bias_rows = take(16 * key_block), key_bias = take(key_block);
    m = take(lanes), l = take(lanes), top = take(lanes), decay = take(lanes), begin = take(lanes), end = take(lanes);
  }
};

inline bool same_for_all_rows(const Args& a, const Rows& rows) {
  const bool one_query = a.mask_row == 0 || rows.first_query() == rows.last_query();
  return one_query && (a.mask_head == 0 || rows.group == 1);
}

// bias[key][row] of a block.
inline void load_biases(const Args& a, const Rows& rows, int64_t first, int keys, const Memory& memory) {
  Walk row(rows);
  for (int r = 0; r < rows.count; r += width) {
    for (int i = 0; i < width; ++i) {
      load_bias(a, mask_at(a, rows, row), first, keys, memory.bias_rows + i * key_block);
      if (r + i + 1 < rows.count) row.next();
    }
    for (int j = 0; j < keys; j += width) {
      F x[width];
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) x[i] = load<DType::f32>(memory.bias_rows + i * key_block + j);
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) store<DType::f32>(memory.bias + (j + i) * lanes + r, x[i]);
    }
  }
}

inline void load_limits(const Args& a, const Rows& rows, int64_t first, int keys, const Memory& memory) {
  Walk row(rows);
  for (int r = 0; r < lanes; ++r) {
    const Range seen = seen_by(a, row.query, first, keys);
    memory.begin[r] = static_cast<float>(seen.begin), memory.end[r] = static_cast<float>(seen.end);
    if (r + 1 < rows.count) row.next();
  }
}

void many_rows(const Args& a, const Rows& rows, const Memory& memory) {
  switch (a.q_type) {
    case DType::bf16: gather<DType::bf16>(a, rows, memory.t); break;
    case DType::f16: gather<DType::f16>(a, rows, memory.t); break;
    default: gather<DType::f32>(a, rows, memory.t); break;
  }
  for (int r = 0; r < lanes; ++r) memory.m[r] = memory.top[r] = lowest, memory.l[r] = 0;
  const bool masked = a.mask_kind != Mask::none, one_bias = masked && same_for_all_rows(a, rows);
  const int64_t head = padded(a.head_size);
  const Range seen = seen_by(a, rows);
  bool begin = true;
  for (int64_t first = seen.begin; first < seen.end; first += key_block) {
    int keys = static_cast<int>(seen.end - first < key_block ? seen.end - first : key_block);
    if (one_bias) {  // the padding of a sequence costs nothing
      load_bias(a, mask_at(a, rows, Walk(rows)), first, keys, memory.key_bias);
      while (keys > 0 && memory.key_bias[keys - 1] == -infinity) --keys;
      if (keys == 0) continue;
    } else if (masked) {
      load_biases(a, rows, first, keys, memory);
    }
    const bool cut = cuts(a, rows, first, keys);
    if (cut) load_limits(a, rows, first, keys, memory);
    Stored k = keys_of(a, rows).from(first), v = values_of(a, rows).from(first);
    if (a.kv_type != Storage::f32) {
      convert(a.kv_type, k, keys, a.head_size, memory.k, head);
      convert(a.kv_type, v, keys, a.head_size, memory.v, head);
      k.rows = reinterpret_cast<const char*>(memory.k), v.rows = reinterpret_cast<const char*>(memory.v);
      k.row_bytes = v.row_bytes = head * 4;
    }
    const Scores scores{reinterpret_cast<const float*>(k.rows),
                        k.row_bytes / 4,
                        a.head_size,
                        memory.t,
                        memory.s,
                        memory.top,
                        one_bias ? memory.key_bias : nullptr,
                        masked && !one_bias ? memory.bias : nullptr,
                        cut ? memory.begin : nullptr,
                        cut ? memory.end : nullptr};
    const float* const v_rows = reinterpret_cast<const float*>(v.rows);
    Values values{v_rows, v.row_bytes / 4, keys, memory.s, memory.o, memory.decay, begin};
    // Where the rows see more and more keys, strips of two vectors leave out most of what they do not see.
    const int most = cut && a.causal && nv > 2 ? 2 : nv;
    for (int lane = 0; lane < rows.count; lane += most * width) {
      const int left = (rows.count - lane + width - 1) / width, vectors = left < most ? left : most;
      if (cut) {
        const int last = lane + vectors * width < rows.count ? lane + vectors * width : rows.count;
        const int64_t end = seen_by(a, (rows.first + last - 1) / rows.group, first, keys).end;
        values.keys = end < 1 ? 1 : static_cast<int>(end);  // one that counts as 0 where there is none
      }
      any_strip<nv>(vectors, scores, values, {memory.m, memory.l}, memory.decay, lane);
    }
    begin = false;
  }
  if (begin) memset(memory.o, 0, static_cast<size_t>(head * lanes) * sizeof(float));
  switch (a.out_type) {
    case DType::bf16: return scatter<DType::bf16>(a, rows, memory.o, memory.l);
    case DType::f16: return scatter<DType::f16>(a, rows, memory.o, memory.l);
    default: return scatter<DType::f32>(a, rows, memory.o, memory.l);
  }
}

void task(const Args& a, int64_t index, void* scratch) {
  const int group = a.heads / a.kv_heads;
  const int64_t all = a.queries * group, blocks = (all + lanes - 1) / lanes, head = index / blocks;
  const int64_t first = index % blocks * lanes;
  const int count = static_cast<int>(all - first < lanes ? all - first : lanes);
  Rows rows{head / a.kv_heads, first, count, static_cast<int>(head % a.kv_heads), group};
  const Memory memory(scratch, a.head_size);
  if (count > most_few_rows) return many_rows(a, rows, memory);
  static_assert(key_block <= lanes && span_keys <= key_block);  // numbers per key in memory for numbers per row
  const FewMemory few_memory{memory.t,     memory.o,   memory.s, memory.key_bias,
                             memory.begin, memory.end, memory.k, memory.v};
  for (int parts = (count + few_rows - 1) / few_rows, left = count; left > 0; --parts) {
    rows.count = (left + parts - 1) / parts;
    few(a, rows, few_memory);
    rows.first += rows.count;
    left -= rows.count;
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
