// The phases of blocks on one team of threads.
#include "fused/runner.h"

#include <algorithm>
#include <chrono>

namespace halfbyte::fused {
namespace {

int64_t now() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }
int64_t mlp_width(const Stack& s) {
  int64_t width = 0;
  for (const Block& b : s.blocks) width = std::max(width, b.up.packed->n);
  return width;
}

bool same_input(const Linear& a, const Linear& b) {
  return same_codes(*a.packed, *b.packed) && a.static_scale == b.static_scale && a.static_zero == b.static_zero;
}

// Whether gate and up cannot share codes, and so not a multiplication.
bool has_own_gate(const Block& b) { return b.gate.packed && !same_input(b.gate, b.up); }

quantize_rows::Args describe(const Linear& linear, uint32_t isas) {
  quantize_rows::Args a{};
  describe_codes(kernel_of(*linear.packed, isas), *linear.packed, a);
  a.static_scale = linear.static_scale;
  a.static_zero = linear.static_zero;
  return a;
}

int64_t largest_codes(const Stack& s, uint32_t isas, int64_t rows) {
  int64_t largest = 0;
  for (const Block& b : s.blocks) {
    int64_t qkv = 0, mlp = 0;
    for (const Linear* l : {&b.q, &b.k, &b.v}) qkv += bytes_of_codes(describe(*l, isas), rows);
    for (const Linear* l : {&b.gate, &b.up}) mlp += l->packed ? bytes_of_codes(describe(*l, isas), rows) : 0;
    largest = std::max({largest, qkv, mlp, bytes_of_codes(describe(b.o, isas), rows), bytes_of_codes(describe(b.down, isas), rows)});
  }
  return largest;
}

Product product(const Linear& linear, float* c, int64_t ldc) {
  Product p{linear.packed.get(), {}};
  p.out.bias = linear.bias;
  p.out.c = c;
  p.out.ldc = ldc;
  p.far = false;
  return p;
}

}  // namespace

Sizes::Sizes(const Stack& s, const Call& call, const Kernels& kernels, int64_t batch, int threads) : threads(threads) {
  const int64_t rows = batch * call.tokens;
  const auto floats = [&](int64_t width) { return round_up(rows * width * int64_t{sizeof(float)}, 64); };
  x = floats(s.hidden);
  h = floats(std::max(s.hidden, q_width(s)));
  qkv = floats(qkv_width(s));
  mlp = floats(mlp_width(s));
  gate = std::any_of(s.blocks.begin(), s.blocks.end(), has_own_gate) ? mlp : 0;
  codes = round_up(largest_codes(s, kernels.isas, rows), 64);
  copies = s.pre_norm && rows <= few_rows ? threads : 1;  // post-norm, a norm writes x
  scratch = round_up(std::max(attention::scratch_bytes(describe_attention(s, call, 0, 0, batch, nullptr, nullptr)),
                              s.hidden * int64_t{sizeof(float)}), 64);
}

Room::Room(const Sizes& sizes, uint8_t* memory) {
  const auto cut = [&](int64_t bytes) {
    uint8_t* const piece = memory;
    memory += bytes;
    return piece;
  };
  x = reinterpret_cast<float*>(cut(sizes.x));
  h = reinterpret_cast<float*>(cut(sizes.h));
  qkv = reinterpret_cast<float*>(cut(sizes.qkv));
  mlp = reinterpret_cast<float*>(cut(sizes.mlp));
  gate = reinterpret_cast<float*>(cut(sizes.gate));
  codes = cut(sizes.copies * sizes.codes);
  scratch = cut(sizes.threads * sizes.scratch);
}

Runner::Runner(const Stack& stack, const Call& call, const Kernels& kernels, int64_t first, int64_t batch, const Sizes& sizes,
               const Room& room, Team& team, Shares& shares, int32_t lane)
    : stack(stack),
      call(call),
      kernels(kernels),
      first(first),
      batch(batch),
      rows(batch * call.tokens),
      first_row(first * call.tokens),
      few(sizes.copies > 1),
      room(room),
      codes(room.codes + (few ? team.rank * sizes.codes : 0)),
      scratch(room.scratch + team.rank * sizes.scratch),
      team(team),
      shares(shares),
      lane(lane) {}

const void* Runner::input() const {
  return static_cast<const char*>(call.x) + first_row * call.ldx * size_of(call.x_type);
}
void* Runner::output() const { return static_cast<char*>(call.out) + first_row * call.ldo * size_of(call.out_type); }

// What ended now began when the one before ended.
void Runner::done(int64_t block, Phase phase) {
  if (!call.timeline) return;
  const int64_t begin = mark, at = call.timeline->count.fetch_add(1, std::memory_order_relaxed);
  mark = now();
  if (at >= call.timeline->capacity) return;
  call.timeline->events[at] = {static_cast<int32_t>(block), phase, lane >= 0 ? lane : team.rank, begin, mark};
}

void Runner::run() {
  if (call.timeline) mark = now();
  read_input();
  for (int64_t i = call.first_block; i < call.last_block; ++i) run_block(i);
  if (call.last_block < static_cast<int64_t>(stack.blocks.size()) || !stack.last_norm) return;
  team.barrier();
  write_norm(*stack.last_norm);
  done(call.last_block - 1, phase_output);
}

// x becomes float32, on the way through the first norm where there is one.
void Runner::read_input() {
  const Piece mine = piece(rows, team);
  if (call.first_block == 0 && stack.first_norm) {
    norm::Args n = describe_norm(*stack.first_norm);
    n.x = input();
    n.ldx = call.ldx;
    n.x_type = call.x_type;
    n.out = room.x;
    kernels.norm.rows(n, mine.begin, mine.end);
  } else {
    quantize_rows::Args a{};
    a.x = input();
    a.ldx = call.ldx;
    a.x_type = call.x_type;
    a.k = a.k_padded = a.ldc = stack.hidden;
    a.bits = 32;
    a.codes = room.x;
    kernels.quantize.rows(a, mine.begin, mine.end);
  }
  done(call.first_block, phase_input);
}

norm::Args Runner::describe_norm(const Norm& parts) const {
  norm::Args n{};
  static_cast<norm::Parameters&>(n) = parts;
  n.k = stack.hidden;
  n.x = room.x;
  n.ldx = n.ldo = stack.hidden;
  n.scratch = reinterpret_cast<float*>(scratch);
  return n;
}

void Runner::write_norm(const Norm& parts) {
  norm::Args n = describe_norm(parts);
  n.out = output();
  n.ldo = call.ldo;
  n.out_type = call.out_type;
  const Piece mine = piece(rows, team);
  kernels.norm.rows(n, mine.begin, mine.end);
}

// Rows times weights: x [rows][ldx], through a norm where one is given, which also goes to `normed` where that is given.
// Products whose activations are quantized in the same way share codes.
void Runner::multiply(const float* x, int64_t ldx, const Norm* through, float* normed, const Product* products,
                      const Linear* const* linears, int count) {
  struct Part {
    quantize_rows::Args codes;
    int begin, end;
  } parts[max_products];
  int found = 0;
  uint8_t* memory = codes;
  for (int i = 0; i < count; ++i) {
    if (i > 0 && same_input(*linears[i], *linears[i - 1])) {
      parts[found - 1].end = i + 1;
      continue;
    }
    Part& part = parts[found++];
    part = {describe(*linears[i], kernels.isas), i, i + 1};
    place_codes(part.codes, rows, memory);
    memory += bytes_of_codes(part.codes, rows);
    part.codes.x = x;
    part.codes.ldx = ldx;
  }
  for (int i = 0; i < found; ++i) {
    Part& part = parts[i];
    const GemmKernel& kernel = kernel_of(*linears[part.begin]->packed, kernels.isas);
    const std::span<const Product> here(products + part.begin, static_cast<size_t>(part.end - part.begin));
    const Multiplication multiplication(kernel, here, part.codes, 0, rows, rows, team.size);
    const Piece mine = few ? Piece{0, rows} : multiplication.rows_to_quantize(team);
    if (few) {
      shares.next_phase(team);
    } else {
      team.barrier();
    }
    if (through && (i == 0 || !normed)) {
      norm::Args n = describe_norm(*through);
      n.x = x;
      n.ldx = ldx;
      n.out = normed;
      n.codes = &part.codes;
      kernels.norm.rows(n, mine.begin, mine.end);
    } else {
      if (through) part.codes.x = normed, part.codes.ldx = stack.hidden;
      kernels.quantize.rows(part.codes, mine.begin, mine.end);
    }
    if (!few) shares.next_phase(team);
    multiplication.run(team, shares);
  }
}

void Runner::run_block(int64_t index) {
  const Block& b = block(index);
  multiply_qkv(index);
  if (stack.rotary_dims > 0 || call.cache) {
    team.barrier();
    append(index);
    done(index, phase_rope);
  }
  attend(index);
  Product o = product(b.o, room.x, stack.hidden);
  o.out.residual = room.x;
  o.out.ldr = stack.hidden;
  const Linear* const linear = &b.o;
  multiply(room.h, q_width(stack), nullptr, nullptr, &o, &linear, 1);
  done(index, phase_o);
  multiply_mlp(index);
}

// A post-norm block gets x through the norm of the block before.
void Runner::multiply_qkv(int64_t index) {
  const Block& b = block(index);
  const int64_t width = qkv_width(stack);
  const Product products[] = {product(b.q, room.qkv, width), product(b.k, room.qkv + q_width(stack), width),
                              product(b.v, room.qkv + q_width(stack) + kv_width(stack), width)};
  const Linear* const linears[] = {&b.q, &b.k, &b.v};
  if (stack.pre_norm) {
    multiply(room.x, stack.hidden, &b.attention_norm, nullptr, products, linears, 3);
  } else {
    const Norm* const before = index > call.first_block ? &block(index - 1).mlp_norm : nullptr;
    multiply(room.x, stack.hidden, before, room.x, products, linears, 3);
  }
  done(index, phase_qkv);
}

void Runner::multiply_mlp(int64_t index) {
  const Block& b = block(index);
  Product up = product(b.up, room.mlp, b.up.packed->n);
  const Norm* through = stack.pre_norm ? &b.mlp_norm : &b.attention_norm;
  float* const normed = stack.pre_norm ? nullptr : room.x;
  if (has_own_gate(b)) {
    Product gate = product(b.gate, room.gate, b.gate.packed->n);
    gate.out.activation = stack.activation;
    const Linear* const linear = &b.gate;
    multiply(room.x, stack.hidden, through, normed, &gate, &linear, 1);
    if (normed) through = nullptr;  // x is normed now
    up.out.factor = room.gate;
    up.out.factor_stride = gate.out.ldc;
  } else {
    up.out.activation = stack.activation;
    up.gate = b.gate.packed.get();
    up.gate_bias = b.gate.bias;
  }
  const Linear* linear = &b.up;
  multiply(room.x, stack.hidden, through, normed, &up, &linear, 1);
  done(index, phase_up);

  Product down = product(b.down, room.x, stack.hidden);
  down.out.residual = room.x;
  down.out.ldr = stack.hidden;
  const bool last = index + 1 == call.last_block;
  const bool stack_ends = index + 1 == static_cast<int64_t>(stack.blocks.size());
  if (last && stack.pre_norm && !(stack_ends && stack.last_norm)) {  // no norm follows
    down.out.c = output();
    down.out.ldc = call.ldo;
    down.out.c_type = call.out_type;
  }
  linear = &b.down;
  multiply(room.mlp, b.down.packed->k, nullptr, nullptr, &down, &linear, 1);
  done(index, phase_down);
  if (!last || stack.pre_norm) return;
  team.barrier();
  write_norm(b.mlp_norm);
  done(index, phase_output);
}

}  // namespace halfbyte::fused
