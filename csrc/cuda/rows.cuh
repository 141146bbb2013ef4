// Rows of floats -> int8 codes: the row quantizer of halfbyte.reference.quantize_rows_ref, alone or behind a norm or a gate.
//
//   plain       v = x
//   layernorm   h = x + residual, mean = sum(h) / k, d = h - mean, r = 1 / sqrt(sum(d^2) / k + eps)
//               v = fma(d * r, weight, bias)
//   rmsnorm     h = x + residual, r = 1 / sqrt(sum(h^2) / k + eps), v = (h * r) * weight
//   silu_mul    v = silu(x) * up
//
// One block per row. A thread has eight neighbours of every 8 * threads() elements, so its memory is touched in whole
// vectors. quantize_row keeps the row in registers; quantize_long_row reads it again for each pass, and takes any alignment.
// Both add in the same order, which depends on k alone: the thread's elements one after the other, then a tree over the
// lanes of a warp, then the warps. So a row has the same codes wherever it lies and whatever the other rows are.
#pragma once
#include "cuda/finish.cuh"
#include "cuda/values.cuh"

namespace halfbyte::cuda {

struct RowsArgs {
  halfbyte_cuda_rows call;
  int vectors;  // k is a multiple of 8 and all rows are aligned for vectors
};

constexpr int rows_threads = 512;             // at most
constexpr int rows_few = 16, rows_many = 64;  // values that a thread keeps in registers
constexpr float smallest_scale = 0x1p-100f;   // below it a row counts as zeros
constexpr float infinity = __builtin_inff();
constexpr int reductions = 4, rows_shared_bytes = reductions * rows_threads / 32 * 4;

// The numbers of all threads as one: in each warp, then over the warps. `slot`: a block's reductions have one each, so that
// each needs one barrier only.
template <class Join>
HALFBYTE_DEVICE float reduce_warp(float v, Join join) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = join(v, shuffle_xor(v, mask));
  return v;
}
template <class Join>
HALFBYTE_DEVICE float reduce_slot(int slot, Join join) {
  const float* const parts = reinterpret_cast<const float*>(shared_memory()) + slot * (rows_threads / 32);
  float v = parts[0];
  for (int warp = 1; warp < threads() / 32; ++warp) v = join(v, parts[warp]);
  return v;
}
HALFBYTE_DEVICE void put_slot(int slot, float v) {
  if (thread() % 32 == 0) reinterpret_cast<float*>(shared_memory())[slot * (rows_threads / 32) + thread() / 32] = v;
}

HALFBYTE_DEVICE float sum_of_block(int slot, float v) {
  const auto join = [](float a, float b) { return add_rn(a, b); };
  v = reduce_warp(v, join);
  if (threads() == 32) return v;
  put_slot(slot, v);
  block_sync();
  return reduce_slot(slot, join);
}

// Of the values and zero; `high` is infinity where a value is NaN or an infinity.
struct Range {
  float low = 0, high = 0;
  int magnitude = 0;  // bits of max|v|; as integers, NaN > infinity > every number

  HALFBYTE_DEVICE void add(float v) {
    const int bits = static_cast<int>(float_to_bits(v) & 0x7fffffffu);
    low = fminf(low, v);
    high = fmaxf(high, v);
    magnitude = bits > magnitude ? bits : magnitude;
  }
  HALFBYTE_DEVICE void over_block() {
    const auto lower = [](float a, float b) { return fminf(a, b); };
    const auto higher = [](float a, float b) { return fmaxf(a, b); };
    low = reduce_warp(low, lower);
    high = reduce_warp(magnitude >= 0x7f800000 ? infinity : high, higher);
    if (threads() == 32) return;
    put_slot(2, low);
    put_slot(3, high);
    block_sync();
    low = reduce_slot(2, lower);
    high = reduce_slot(3, higher);
  }
};

// 1.5 * 2^23 + v has the integer next to v, the even one of two, in its low bits: |v| < 2^22.
HALFBYTE_DEVICE int round_to_int(float v) {
  return static_cast<int>(float_to_bits(add_rn(v, 12582912.0f))) - 0x4b400000;
}

// How the values of a row become codes.
struct Grid {
  float scale, inverse, lowest, highest;  // bounds of v / scale
  int zero;
  bool finite;

  HALFBYTE_DEVICE Grid(const Range& range, const halfbyte_cuda_rows& call)
      : scale(call.static_scale), zero(call.static_zero), finite(range.high < infinity) {
    if (call.static_scale == 0) {
      scale = call.symmetric ? div_rn(fmaxf(-range.low, range.high), 127.0f)
                             : add_rn(div_rn(range.high, 255.0f), -div_rn(range.low, 255.0f));
      zero = 0;
      const bool empty = scale < smallest_scale;
      if (empty) scale = 1.0f;
      // Of at most 255 (1 + 2^-22), hence an int8.
      if (!empty && !call.symmetric && finite) zero = round_to_int(-mul_rn(range.low, div_rn(1.0f, scale))) - 128;
    }
    inverse = div_rn(1.0f, scale);
    lowest = static_cast<float>(-128 - zero);
    highest = static_cast<float>(127 - zero);
  }
  // The bounds are integers, so that clip(rint(v)) is rint(clip(v)). Only the low byte is the code. (Symmetric rows reach
  // no bound: |v| / scale is at most 127 (1 + 2^-22).)
  HALFBYTE_DEVICE uint32_t code(float v) const {
    return static_cast<uint32_t>(round_to_int(fminf(fmaxf(mul_rn(v, inverse), lowest), highest)) + zero);
  }
  HALFBYTE_DEVICE uint32_t codes4(const float* v) const {
    const uint32_t first = permute(code(v[0]), code(v[1]), 0x0040), second = permute(code(v[2]), code(v[3]), 0x0040);
    return finite ? permute(first, second, 0x5410) : 0;
  }
};

// What the threads write besides the codes of the elements.
HALFBYTE_DEVICE void finish_row(const halfbyte_cuda_rows& call, const Grid& grid) {
  const int64_t row = block_x();
  if (thread() == 0) {
    call.scale[row] = grid.finite ? grid.scale : bits_to_float(0x7fc00000u);
    if (call.zero) call.zero[row] = grid.finite ? grid.zero : 0;
  }
  for (int i = call.k + thread(); i < call.k_padded; i += threads()) call.codes[row * call.ldc + i] = 0;
}

HALFBYTE_HD constexpr bool is_norm(int kind) { return kind == HALFBYTE_ROWS_LAYERNORM || kind == HALFBYTE_ROWS_RMSNORM; }

// x and its second operand, if there is one -> h, or the value of silu_mul.
template <int kind>
HALFBYTE_DEVICE void combine(float (&v)[8], const float (&second)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    v[j] = kind == HALFBYTE_ROWS_SILU_MUL ? mul_rn(activate(v[j], HALFBYTE_SILU), second[j]) : add_rn(v[j], second[j]);
  }
}

template <int kind>
struct Norm {
  float mean = 0, inverse = 0, k, eps;
  bool has_weight, has_bias;

  HALFBYTE_DEVICE explicit Norm(const halfbyte_cuda_rows& call)
      : k(static_cast<float>(call.k)), eps(call.eps), has_weight(call.weight), has_bias(call.bias) {}

  HALFBYTE_DEVICE void set_mean(float sum) { mean = div_rn(sum_of_block(0, sum), k); }
  HALFBYTE_DEVICE void set_squares(float sum) { inverse = rsqrt_rn(add_rn(div_rn(sum_of_block(1, sum), k), eps)); }
  HALFBYTE_DEVICE float centered(float h) const { return kind == HALFBYTE_ROWS_LAYERNORM ? add_rn(h, -mean) : h; }
  HALFBYTE_DEVICE float value(float h, float weight, float bias) const {
    const float y = mul_rn(centered(h), inverse);
    if (has_weight) return has_bias ? fma_rn(y, weight, bias) : mul_rn(y, weight);
    return has_bias ? add_rn(y, bias) : y;
  }
};

// bytes: of an element of x. values: in the registers of a thread. Rows that `vectors` describes.
template <int kind, int values, int bytes>
HALFBYTE_KERNEL(rows_threads, 1) quantize_row(const RowsArgs args) {
  let_next_kernel_start();
  const halfbyte_cuda_rows& call = args.call;
  constexpr int chunks = values / 8;
  // Loads under way at once: as many as fit the registers beside the values.
  constexpr int most = 8 / bytes, batch = chunks < most ? chunks : most;
  const int64_t row = block_x();
  const int first = 8 * thread(), step = 8 * threads();
  const void* const x = row_of(call.x, row, call.ldx, bytes);
  const bool has_second = kind != HALFBYTE_ROWS_PLAIN && call.residual;
  const void* const second = has_second ? row_of(call.residual, row, call.ld_residual, bytes) : nullptr;

  float v[chunks][8];
#pragma unroll
  for (int b = 0; b < chunks; b += batch) {
    Eight<bytes> raw[batch] = {}, other[batch] = {};
#pragma unroll
    for (int c = 0; c < batch; ++c) {
      const int i = first + (b + c) * step;
      if (i < call.k) raw[c] = load8<bytes>(x, i);
      if (has_second && i < call.k) other[c] = load8<bytes>(second, i);
    }
#pragma unroll
    for (int c = 0; c < batch; ++c) {
      float w[8];
      widen(raw[c], call.x_type, v[b + c]);
      if (!has_second) continue;
      widen(other[c], call.x_type, w);
      combine<kind>(v[b + c], w);
    }
  }

  if constexpr (is_norm(kind)) {
    Norm<kind> norm(call);
    // Under way while the sums are made, where there are registers for them.
    constexpr bool early = values == rows_few;
    Eight<4> weight[early ? chunks : 1] = {}, bias[early ? chunks : 1] = {};
    const auto load_both = [&](Eight<4>& w, Eight<4>& b, int i) {
      if (norm.has_weight && i < call.k) w = load8<4>(call.weight, i);
      if (norm.has_bias && i < call.k) b = load8<4>(call.bias, i);
    };
    float sum = 0, squares = 0;
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      const int i = first + c * step;
      if constexpr (early) load_both(weight[c], bias[c], i);
      if (call.sum && i < call.k) {
        store8(row_of(call.sum, row, call.ld_sum, bytes), i, bytes == 4 ? HALFBYTE_F32 : call.x_type, v[c]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) sum = add_rn(sum, v[c][j]);
    }
    if constexpr (kind == HALFBYTE_ROWS_LAYERNORM) norm.set_mean(sum);
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      if (first + c * step >= call.k) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float d = norm.centered(v[c][j]);
        squares = fma_rn(d, d, squares);
      }
    }
    norm.set_squares(squares);
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      const int i = first + c * step;
      if (i >= call.k) continue;
      if constexpr (!early) load_both(weight[0], bias[0], i);
      float w[8], b[8];
      widen(weight[early ? c : 0], HALFBYTE_F32, w);
      widen(bias[early ? c : 0], HALFBYTE_F32, b);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[c][j] = norm.value(v[c][j], w[j], b[j]);
    }
  }

  Range range;
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
#pragma unroll
    for (int j = 0; j < 8; ++j) range.add(v[c][j]);  // what lies behind k is 0
  }
  range.over_block();
  const Grid grid(range, call);
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const int i = first + c * step;
    if (i >= call.k) continue;
    *reinterpret_cast<Word2*>(call.codes + row * call.ldc + i) = Word2{grid.codes4(v[c]), grid.codes4(v[c] + 4)};
  }
  finish_row(call, grid);
}

// A row of any length and alignment.
template <int kind>
struct LongRow {
  const halfbyte_cuda_rows& call;
  bool vectors;
  int64_t row = block_x();
  int bytes = float_bytes(call.x_type);

  // each(v, i, n): n of the elements from column i on.
  template <class Each>
  HALFBYTE_DEVICE void pass(Each each) const {
    for (int i = 8 * thread(); i < call.k; i += 8 * threads()) {
      const int n = call.k - i < 8 ? call.k - i : 8;
      float v[8], second[8];
      read(v, row_of(call.x, row, call.ldx, bytes), i, n, call.x_type);
      if (kind != HALFBYTE_ROWS_PLAIN && call.residual) {
        read(second, row_of(call.residual, row, call.ld_residual, bytes), i, n, call.x_type);
        combine<kind>(v, second);
      }
      each(v, i, n);
    }
  }
  // Zeros in the place of those behind k.
  HALFBYTE_DEVICE void read(float (&v)[8], const void* p, int i, int n, int type) const {
    if (vectors && type == HALFBYTE_F32) return widen(load8<4>(p, i), type, v);
    if (vectors) return widen(load8<2>(p, i), type, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = j < n ? load_as_float(p, i + j, type) : 0.0f;
  }
  HALFBYTE_DEVICE void normalize(const Norm<kind>& norm, float (&v)[8], int i, int n) const {
    float weight[8] = {}, bias[8] = {};
    if (norm.has_weight) read(weight, call.weight, i, n, HALFBYTE_F32);
    if (norm.has_bias) read(bias, call.bias, i, n, HALFBYTE_F32);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = j < n ? norm.value(v[j], weight[j], bias[j]) : 0.0f;
  }
  HALFBYTE_DEVICE void write_sum(const float (&v)[8], int i, int n) const {
    void* const sum = row_of(call.sum, row, call.ld_sum, bytes);
    if (vectors) return store8(sum, i, call.x_type, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < n) store_as(sum, i + j, call.x_type, v[j]);
    }
  }
  HALFBYTE_DEVICE void write_codes(const Grid& grid, const float (&v)[8], int i, int n) const {
    int8_t* const codes = call.codes + row * call.ldc + i;
    const Word2 packed{grid.codes4(v), grid.codes4(v + 4)};
    if (vectors) {
      *reinterpret_cast<Word2*>(codes) = packed;
      return;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < n) codes[j] = static_cast<int8_t>((j < 4 ? packed.x : packed.y) >> (8 * (j % 4)));
    }
  }
};

template <int kind>
HALFBYTE_KERNEL(rows_threads, 1) quantize_long_row(const RowsArgs args) {
  let_next_kernel_start();
  const halfbyte_cuda_rows& call = args.call;
  const LongRow<kind> row{call, args.vectors != 0};
  Norm<kind> norm(call);
  if constexpr (kind == HALFBYTE_ROWS_LAYERNORM) {
    float sum = 0;
    row.pass([&](float (&v)[8], int, int) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum = add_rn(sum, v[j]);
    });
    norm.set_mean(sum);
  }
  if constexpr (is_norm(kind)) {
    float squares = 0;
    row.pass([&](float (&v)[8], int, int n) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float d = j < n ? norm.centered(v[j]) : 0.0f;
        squares = fma_rn(d, d, squares);
      }
    });
    norm.set_squares(squares);
  }
  Range range;
  row.pass([&](float (&v)[8], int i, int n) {
    if constexpr (is_norm(kind)) row.normalize(norm, v, i, n);
#pragma unroll
    for (int j = 0; j < 8; ++j) range.add(v[j]);
  });
  range.over_block();
  const Grid grid(range, call);
  // The sum may lie where x or the residual does: it is written when they are read for the last time.
  row.pass([&](float (&v)[8], int i, int n) {
    if constexpr (is_norm(kind)) {
      if (call.sum) row.write_sum(v, i, n);
      row.normalize(norm, v, i, n);
    }
    row.write_codes(grid, v, i, n);
  });
  finish_row(call, grid);
}

}  // namespace halfbyte::cuda
