// The phases of blocks on one team of threads, and the memory they need.
#pragma once
#include "core/cpu_features.h"
#include "core/multiply.h"
#include "fused/stack.h"
#include "ops/norm/op.h"
#include "ops/rope/op.h"

namespace halfbyte::fused {

// Chosen by the thread that calls: a forced instruction set is its own.
struct Kernels {
  uint32_t isas = active_isas();
  const quantize_rows::Kernel& quantize = quantize_rows::select();
  const norm::Kernel& norm = norm::select();
  const rope::Kernel& rope = rope::select();
  const attention::Kernel& attention = attention::select();
};

inline int64_t q_width(const Stack& s) { return int64_t{s.heads} * s.head_size; }
inline int64_t kv_width(const Stack& s) { return int64_t{s.kv_heads} * s.head_size; }
inline int64_t qkv_width(const Stack& s) { return q_width(s) + 2 * kv_width(s); }

// Of sequences [first, first + batch), whose queries, keys and values lie in `qkv` where they are in no cache.
attention::Args describe_attention(const Stack& stack, const Call& call, int64_t index, int64_t first, int64_t batch,
                                   float* qkv, float* out);

// So few rows that each thread quantizes all of them, for itself, rather than wait for the others' at a barrier: a row of a
// thousand elements takes about as long.
constexpr int64_t few_rows = 3;

// Bytes of the memory of one unit: all rows where threads work together, else the sequences that one of them runs.
struct Sizes {
  Sizes(const Stack& stack, const Call& call, const Kernels& kernels, int64_t batch, int threads);
  int64_t x, h, qkv, mlp;  // the residual stream; [rows][max(hidden, heads)]; [rows][q, k and v]; [rows][mlp]
  int64_t gate;            // [rows][mlp], where the input of a gate is quantized in another way than that of its up
  int64_t codes;           // of up to max_products formats, one behind the other
  int64_t copies;          // of the codes: one per thread where rows are few
  int64_t scratch;         // of each thread, for attention and norms
  int threads;
  int64_t total() const { return x + h + qkv + mlp + gate + copies * codes + threads * scratch; }
};

struct Room {
  Room(const Sizes& sizes, uint8_t* memory);
  float *x, *h, *qkv, *mlp, *gate;
  uint8_t *codes, *scratch;
};

// Sequences [first, first + batch) on one team. Every thread of the team makes one and calls run().
class Runner {
 public:
  // lane: of the thread where its team is itself alone, else -1.
  Runner(const Stack& stack, const Call& call, const Kernels& kernels, int64_t first, int64_t batch, const Sizes& sizes,
         const Room& room, Team& team, Shares& shares, int32_t lane);
  void run();

 private:
  const void* input() const;
  void* output() const;
  const Block& block(int64_t index) const { return stack.blocks[static_cast<size_t>(index)]; }
  void done(int64_t block, Phase phase);
  norm::Args describe_norm(const Norm& parts) const;
  void write_norm(const Norm& parts);
  void read_input();
  void run_block(int64_t index);
  void multiply_qkv(int64_t index);
  void append(int64_t index);
  void store_codes(const float* from, int8_t* codes, float* scale, Piece mine) const;
  void attend(int64_t index);
  void multiply_mlp(int64_t index);
  void multiply(const float* x, int64_t ldx, const Norm* through, float* normed, const Product* products,
                const Linear* const* linears, int count);

  const Stack& stack;
  const Call& call;
  const Kernels& kernels;
  const int64_t first, batch, rows, first_row;
  const bool few;
  const Room& room;
  uint8_t *const codes, *const scratch;  // of this thread, or codes of all
  Team& team;
  Shares& shares;
  const int32_t lane;
  int64_t mark = 0;  // when the last phase ended
};

}  // namespace halfbyte::fused
