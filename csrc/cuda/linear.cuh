// linear for few rows: y = activation(x @ weight.T + bias) + residual where reading the weights is what takes the time.
//
// The weights are operand A of the mma, so channels go along its 16 rows and the few rows of x along its 8 columns. A warp
// owns a tile of 64 channels x 128 k at a time: it copies tiles into its own ring in shared memory, waits for its own
// copies alone, decodes a piece of 512 bytes at a time and multiplies. x needs no shared memory: in the k order of
// layout.h the operand B of two mma is 16 bytes of a row. Warps of a block, and blocks along x, share out the tiles of k;
// the sums meet in shared memory, in the order of the warps, then of the blocks, so results are the same in every run.
//
//   acc     int8 x, no groups: exact int32. Otherwise float32:
//   t       sum over groups of acc_g * group_scale + (sum of x over the group) * offset; the sums of x come from an mma
//           whose A is all ones
#pragma once
#include "cuda/multiply.cuh"

namespace halfbyte::cuda {

template <class T>
constexpr bool is_integer = T(0.5f) == 0;

// The value of one output before activation and residual.
template <int bits, class Sum>
HALFBYTE_DEVICE float scaled(Sum sum, const Scales& scales, int64_t m, int64_t n) {
  if constexpr (!is_integer<Sum>) {
    return scales.from_float(sum, m, n);
  } else if constexpr (bits == 8) {
    return scales.from_int(sum, m, n);
  } else {
    return scales.from_float(0.0625f * static_cast<float>(sum), m, n);  // decode4_s8
  }
}

// One output. gate: 0 where there is none.
template <int bits, class Sum>
HALFBYTE_DEVICE void finish(const halfbyte_cuda_linear& c, Sum sum, Sum gate, int64_t m, int64_t n) {
  float v = scaled<bits>(sum, Scales{c.x_scale, c.x_zero, c.scale, c.total, c.bias}, m, n);
  if (c.gate) {
    const Scales of_gate{c.x_scale, c.x_zero, c.gate_scale, c.gate_total, c.gate_bias};
    v = mul_rn(v, activate(scaled<bits>(gate, of_gate, m, n), c.activation));
  } else {
    v = activate(v, c.activation);
  }
  Output{c.y, c.residual, c.ldy, c.ld_residual, c.y_type, c.residual_type}.store(v, m, n);
}

// The numbers of 64 channels that are read at the end, when nothing hides how far away they are.
HALFBYTE_DEVICE void prefetch_scales(const halfbyte_cuda_linear& c, int64_t n0) {
  const void* const arrays[] = {c.scale, c.bias, c.total, c.gate_scale, c.gate_bias, c.gate_total};
  constexpr int line = 32, lines = tile_n / line;  // of 128 bytes
  const int64_t n = n0 + thread() % lines * line;
  if (thread() >= lines || n >= c.n) return;
#pragma unroll
  for (const void* array : arrays) {
    if (array) prefetch_into_l2(static_cast<const float*>(array) + n);
  }
}

// Tiles are read once, unless there are blocks of other rows.
HALFBYTE_DEVICE uint64_t tile_policy() { return blocks_y() > 1 ? normal_policy() : evict_first_policy(); }

// Copy: how a warp's tiles come into shared memory (start, wait), what to wait for before x is read (before_x), and how the
// sums of blocks that share k meet and become outputs (meet).
// Grid: blocks that share k, blocks of rows, tiles of channels.
template <class Copy, int x_type, int bits, int columns, Has has>
HALFBYTE_KERNEL(256, columns == 1 ? 2 : 1)
linear_kernel(const LinearArgs args) {
  using Multiply = Multiplier<x_type, bits, columns, has>;
  using Sum = typename Multiply::Sum;
  const halfbyte_cuda_linear& call = args.call;
  const int lane = thread() % 32, warp = thread() / 32;
  const int sides = call.gate ? 2 : 1, warps = args.schedule.warps / sides;  // that share out k
  const int side = warp / warps, stages = args.schedule.stages;
  const int step = blocks_x() * warps, first = block_x() * warps + warp % warps;
  int64_t begin = static_cast<int64_t>(block_z()) * args.k_tiles;
  int tiles = args.k_tiles;  // of these channels
  if constexpr (has == Has::blocks) {
    begin = call.starts[block_z()];
    tiles = call.starts[block_z() + 1] - static_cast<int>(begin);
  }
  const int count = first < tiles ? (tiles - first + step - 1) / step : 0;
  const uint8_t* weight = (side ? call.gate : call.weight) + (begin + first) * args.tile_bytes;
  const int64_t stride = static_cast<int64_t>(step) * args.tile_bytes;

  char* ring = shared_memory() + Copy::header_bytes + warp * stages * args.tile_bytes;
  Copy copy(shared_memory(), ring, args, warp, lane);
#pragma unroll 1
  for (int i = 0; i < stages; ++i) copy.start(i < count, i, weight + i * stride);
  prefetch_scales(call, static_cast<int64_t>(block_z()) * tile_n);

  copy.before_x();  // the weights are on their way; x may still be being made

  Multiply multiply;
  int stage = 0, round = 0;
  for (int i = 0; i < count; ++i) {
    const char* tile = ring + stage * args.tile_bytes;
    int64_t k = static_cast<int64_t>(first + i * step) * tile_k;
    if constexpr (has == Has::blocks) {
      k = static_cast<int64_t>(call.columns[begin + first + i * step]) * (tile_k / 2);
      typename Multiply::X x;
      Multiply::load_x(call, k, lane, x);
      copy.wait(stage, round & 1);
      multiply.multiply64(tile, args, x, 0, lane);
    } else if constexpr (has == Has::pairs) {
      typename Multiply::X x[2];
      Multiply::load_x(call, k, lane, x[0]);
      Multiply::load_x(call, k + 64, lane, x[1]);
      copy.wait(stage, round & 1);
      multiply.multiply_pairs(tile, x[0], 0, lane);
      multiply.multiply_pairs(tile, x[1], 1, lane);
    } else if constexpr (columns < 4) {
      typename Multiply::X x[2];
      Multiply::load_x(call, k, lane, x[0]);
      Multiply::load_x(call, k + 64, lane, x[1]);
      copy.wait(stage, round & 1);
      multiply.multiply64(tile, args, x[0], 0, lane);
      multiply.multiply64(tile, args, x[1], 1, lane);
    } else {
      copy.wait(stage, round & 1);
#pragma unroll 1  // registers for one half of x at a time
      for (int half = 0; half < 2; ++half) {
        typename Multiply::X x;
        Multiply::load_x(call, k + 64 * half, lane, x);
        multiply.multiply64(tile, args, x, half, lane);
      }
    }
    warp_sync();  // all lanes have read the tile
    copy.start(i + stages < count, stage, weight + (i + stages) * stride);
    if (++stage == stages) stage = 0, ++round;
  }

  // Nobody reads tiles any more: their memory takes the sums, [warp][rows][64 channels]. Of a row the channels are in an
  // order in which neither the lanes that write (2 rows x 8 channels x 4) nor those that read (32 channels) meet in a bank.
  block_sync();
  Sum* sums = reinterpret_cast<Sum*>(shared_memory() + Copy::header_bytes);
  constexpr int warp_sums = 8 * columns * tile_n;
  auto place = [](int row, int channel) { return row * tile_n + (channel ^ row / 2 % 4 * 8); };
#pragma unroll
  for (int p = 0; p < pieces; ++p) {
#pragma unroll
    for (int c = 0; c < columns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = place(8 * c + lane % 4 * 2 + i % 2, 16 * p + lane / 4 + i / 2 * 8);
        sums[warp * warp_sums + at] = multiply.sum[p][c][i];
      }
    }
  }
  block_sync();
  const int64_t m0 = static_cast<int64_t>(block_y()) * (8 * columns), n0 = static_cast<int64_t>(block_z()) * tile_n;
  const int rows = call.m - m0 < 8 * columns ? static_cast<int>(call.m - m0) : 8 * columns;
  // Element e: of row e / 64 the channel e % 64.
  auto sum_of = [&](int of_side, int e) { return sums + of_side * warps * warp_sums + place(e / tile_n, e % tile_n); };
#pragma unroll 1
  for (int e = thread(); e < rows * tile_n; e += threads()) {
    for (int s = 0; s < sides; ++s) {
      Sum* const of_warps = sum_of(s, e);
      Sum v = of_warps[0];
#pragma unroll 4
      for (int w = 1; w < warps; ++w) v += of_warps[w * warp_sums];
      of_warps[0] = v;
    }
  }
  Copy::template meet<bits, Sum>(args, rows, m0, n0, sum_of);
}

}  // namespace halfbyte::cuda
