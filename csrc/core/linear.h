// The linear ops: y = activation(x W^T + bias) + residual on packed weights. An op is a name, two numbers of bits and a
// list of kernels; what is common to all is here.
#pragma once
#include <span>

#include "core/dispatch.h"
#include "core/packed_weight.h"
#include "ops/norm/op.h"

namespace halfbyte {

// How the panels of a packed weight are laid out.
enum class Layout {
  dense,
  blocks,   // those of 16 channels x quad k (integers) or 16 x 1 (floats) that are not all zero
  windows,  // per 64 k the nonzero values of 16 channels, four of each to a line of 64
  masks,    // per channel and 64 k a mask of 64 bits, and the nonzero values; where most is zero, lists too
};

struct LinearOp {
  const char* name;
  int weight_bits, activation_bits;
  std::span<const GemmKernel* const> kernels;  // best first
  Layout layout = Layout::dense;
};

const LinearOp& linear_op(const std::string& name);  // throws std::invalid_argument

// Most k whose exact int32 sum cannot overflow: whole multiples of 64 below (2^31 - 1) / (255 * 128).
constexpr int64_t max_k = 65792;
// 16-bit activations are summed over this many k at most: 32639 * 255 * 128 < 2^31.
constexpr int64_t wide_group = 128;

// A weight as it is stored: rows of codes and, where there are any, [n][groups] of the rest, dense.
//   w = ((c - zero) * group_scale + minimum) * scale
// c is the int8 code; of 4-bit codes the nibble u (zero is 8 where none is given and there is no minimum); with nf4
// nf4_levels[u]. See docs/ops/linear_w4a8.md.
struct StoredWeight {
  int64_t n, k;
  const void* codes;     // int8 [n][k], or bytes [n][(k + 1) / 2] with even k in the low half
  int64_t ld;            // bytes between rows
  const float* scale;    // [n]
  int64_t group;         // 0: per channel; else a multiple of 4
  const void* group_scale;  // may be null
  DType group_scale_type;   // f32 or f16; of minimum too
  const int8_t* zero;       // may be null
  const void* minimum;      // may be null
  bool nf4;
  int64_t activation_group;  // 0: per token; otherwise `group`, or anything where that is 0
};

float load_float(const void* p, DType type, int64_t i);  // element i, of a float type

// Throw std::invalid_argument.
PackedWeight pack_float(const void* weight, DType type, int64_t n, int64_t k, int64_t ld, int threads);  // for linear_f32
PackedWeight pack_linear(const LinearOp& op, const StoredWeight& weight, int threads);

// A weight with its zeros, of which the op packs what is not zero.
struct SparseWeight {
  int64_t n, k;
  const void* weight;  // [n][k]: int8 codes, of ops of 4 bits too, otherwise floats
  DType type;
  int64_t ld;          // elements between rows
  const float* scale;  // [n], of codes
  int nonzero, of;     // of each `of` consecutive k at most `nonzero` are not zero; 0: anywhere
  int64_t group;             // of 4-bit codes: k per scale
  const void* group_scale;   // [n][groups]
  DType group_scale_type;    // f32 or f16
};
PackedWeight pack_sparse(const LinearOp& op, const SparseWeight& weight, int threads);
void unpack_linear(const PackedWeight& packed, void* codes, int64_t ld);  // of integer codes

struct LinearArgs {
  int64_t m;
  const void* a;
  int64_t lda;  // elements between rows
  DType a_type;
  void* c;
  int64_t ldc;
  DType c_type;       // i32: the sums themselves, of a weight without groups; takes no bias, activation or residual
  const float* bias;  // may be null
  Activation activation;
  const void* residual;  // may be null
  int64_t ldr;
  DType residual_type;
  float static_scale;  // 0: dynamic
  int32_t static_zero;
  int threads;  // 0: default
  // Of a gated product, c = (x W^T + bias) * activation(x G^T + gate_bias) + residual: G, of the shape and format of W.
  const PackedWeight* gate = nullptr;
  const float* gate_bias = nullptr;
  // What the rows of x go through first, and are quantized from as float32. May be null.
  const norm::Parameters* norm = nullptr;
};

struct LinearCall {
  const PackedWeight* packed;
  LinearArgs args;
};

// Throw std::invalid_argument.
void run_linear(const PackedWeight& packed, const LinearArgs& args);
// Several weights on one x (query, key and value), which is quantized once: the calls agree in m, x, the norm, the static
// scale and the threads.
void run_linears(std::span<const LinearCall> calls);

}  // namespace halfbyte
