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
#include "cuda/decode.cuh"
#include "cuda/finish.cuh"
#include "cuda/kernels.h"

namespace halfbyte::cuda {

template <bool same, class A, class B>
struct Pick {
  using type = A;
};
template <class A, class B>
struct Pick<false, A, B> {
  using type = B;
};

constexpr int pieces = pieces_side_by_side;

// What a weight has besides a scale per channel: scales of groups, offsets too, or zeros.
enum class Has { nothing, groups, offsets, pairs, blocks };

// The scales (or offsets) of one group for a lane's eight channels, g and g + 8 of each piece.
struct OfGroup {
  float v[pieces][2];

  HALFBYTE_DEVICE void load(const char* at, int group, int lane, int bytes) {
    at += (group * tile_n + lane / 4 * 8) * bytes;
    if (bytes == 2) {
      const Word4 w = *reinterpret_cast<const Word4*>(at);
      const uint32_t pairs[pieces] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
        v[p][0] = f16_to_float(static_cast<uint16_t>(pairs[p]));
        v[p][1] = f16_to_float(static_cast<uint16_t>(pairs[p] >> 16));
      }
    } else {
      const Word4 w[2] = {reinterpret_cast<const Word4*>(at)[0], reinterpret_cast<const Word4*>(at)[1]};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        v[2 * i][0] = bits_to_float(w[i].x);
        v[2 * i][1] = bits_to_float(w[i].y);
        v[2 * i + 1][0] = bits_to_float(w[i].z);
        v[2 * i + 1][1] = bits_to_float(w[i].w);
      }
    }
  }
};

// x_type: HALFBYTE_F16, HALFBYTE_BF16 or HALFBYTE_I8. columns: rows of x in units of 8.
template <int x_type, int bits, int columns, Has has>
struct Multiplier {
  static constexpr bool grouped = has == Has::groups || has == Has::offsets, offsets = has == Has::offsets;
  static constexpr bool integer = x_type == HALFBYTE_I8;
  static constexpr int words = integer ? 2 : 4;  // of x in 32 k of a row, in one lane
  static constexpr int x_bytes = integer ? 1 : 2;
  using Acc = typename Pick<integer, int, float>::type;
  using Sum = typename Pick<integer && !grouped, int, float>::type;

  Sum sum[pieces][columns][4];

  HALFBYTE_DEVICE Multiplier() {
#pragma unroll
    for (int i = 0; i < pieces * columns * 4; ++i) (&sum[0][0][0])[i] = 0;
  }

  // 64 k of x.
  struct X {
    uint32_t b[2][columns][words];
  };

  HALFBYTE_DEVICE static void load_x(const halfbyte_cuda_linear& call, int64_t k, int lane, X& x) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      const int64_t m = static_cast<int64_t>(block_y()) * (8 * columns) + 8 * c + g;
      const char* row = static_cast<const char*>(call.x) + m * call.ldx * x_bytes;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t at = k + 32 * h + 8 * t;
        const bool there = m < call.m && at < call.k;
        if constexpr (integer) {
          const Word2 v = there ? load_constant8(row + at) : Word2{0, 0};
          x.b[h][c][0] = bits == 4 ? permute(v.x, 0, quad_order4) : v.x;
          x.b[h][c][1] = bits == 4 ? permute(v.y, 0, quad_order4) : v.y;
        } else {
          const Word4 v = there ? load_constant16(row + at * 2) : Word4{0, 0, 0, 0};
          x.b[h][c][0] = v.x;
          x.b[h][c][1] = v.y;
          x.b[h][c][2] = v.z;
          x.b[h][c][3] = v.w;
        }
      }
    }
  }

  HALFBYTE_DEVICE static void mma(Acc (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (integer) {
      mma_s8(d, a, b0, b1);
    } else if constexpr (x_type == HALFBYTE_F16) {
      mma_f16(d, a, b0, b1);
    } else {
      mma_bf16(d, a, b0, b1);
    }
  }

  // d += 16 channels x 32 k (h: which of the 64) times x; a: from decode.
  HALFBYTE_DEVICE static void multiply32(Acc (&d)[4], const uint32_t (&a)[2][4], const X& x, int h, int c) {
    mma(d, a[0], x.b[h][c][0], x.b[h][c][1]);
    if constexpr (!integer) mma(d, a[1], x.b[h][c][2], x.b[h][c][3]);
  }

  // Operand A of the 32 k h of a piece column p: one m16n8k32, or two m16n8k16.
  HALFBYTE_DEVICE static void decode(const char* codes, int half, int h, int p, int lane, uint32_t (&a)[2][4]) {
    if constexpr (bits == 4) {
      const char* at = codes + (half * pieces + p) * piece_bytes + lane * lane_bytes + 8 * h;
      const Word2 q = *reinterpret_cast<const Word2*>(at);
      if constexpr (integer) {
        decode4_s8(q.x, q.y, a[0]);
      } else {
        decode4<x_type>(q.x, a[0]);
        decode4<x_type>(q.y, a[1]);
      }
    } else {
      const char* at = codes + ((half * 2 + h) * pieces + p) * piece_bytes + lane * lane_bytes;
      const Word4 q = *reinterpret_cast<const Word4*>(at);
      if constexpr (integer) {
        a[0][0] = q.x;
        a[0][1] = q.y;
        a[0][2] = q.z;
        a[0][3] = q.w;
      } else {
        decode8<x_type>(q.x, q.y, a[0]);
        decode8<x_type>(q.z, q.w, a[1]);
      }
    }
  }

  // Sums of x over the groups that end in the first and in the second 32 k.
  struct XSums {
    float of[2][columns][2];
  };

  HALFBYTE_DEVICE static void sum_x(const X& x, bool ends_each_32, XSums& sums) {
    constexpr uint32_t one = integer ? 0x01010101u : x_type == HALFBYTE_F16 ? 0x3c003c00u : 0x3f803f80u;
    const uint32_t ones[2][4] = {{one, one, one, one}, {one, one, one, one}};
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      Acc d[4] = {0, 0, 0, 0};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        multiply32(d, ones, x, h, c);
        sums.of[h][c][0] = static_cast<float>(d[0]);
        sums.of[h][c][1] = static_cast<float>(d[1]);
        if (ends_each_32) d[0] = d[1] = d[2] = d[3] = 0;
      }
    }
  }

  HALFBYTE_DEVICE static void add_group(Acc (&part)[4], const float (&scale)[2], Sum (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float v = static_cast<float>(part[i]);
      if constexpr (integer && bits == 4) v *= 0.0625f;  // codes of decode4_s8 are 16 times as large
      to[i] = fma_rn(v, scale[i / 2], to[i]);
      part[i] = 0;
    }
  }

  // The part of the offsets of one group.
  HALFBYTE_DEVICE void add_offsets(const OfGroup& offset, const float (&x_sum)[columns][2]) {
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
#pragma unroll
      for (int c = 0; c < columns; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[p][c][i] = fma_rn(x_sum[c][i % 2], offset.v[p][i / 2], sum[p][c][i]);
      }
    }
  }

  // 64 k of a tile of pairs.
  HALFBYTE_DEVICE void multiply_pairs(const char* tile, const X& x, int half, int lane) {
    constexpr int code_bytes = WeightFormat{8, 0, 4, false, two_of_four}.code_bytes();
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      const int piece = half * pieces + p;
      const Word4 q = *reinterpret_cast<const Word4*>(tile + piece * piece_bytes + lane * lane_bytes);
      const uint32_t indices = *reinterpret_cast<const uint32_t*>(tile + code_bytes + (piece * 32 + lane) * 4);
      const uint32_t a[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int c = 0; c < columns; ++c) {
        const uint32_t b[4] = {x.b[0][c][0], x.b[0][c][1], x.b[1][c][0], x.b[1][c][1]};
        mma_sparse_s8(sum[p][c], a, b, indices);
      }
    }
  }

  // 64 k of a tile.
  HALFBYTE_DEVICE void multiply64(const char* tile, const LinearArgs& args, const X& x, int half, int lane) {
    const bool each_32 = args.group_shift == 5;
    OfGroup scale[2];  // of the group of the first 32 k, where it ends there, and of the last
    if constexpr (grouped) {
      const int bytes = args.call.format.scale_bytes, last = (half * 64 + 32) >> args.group_shift;
      scale[1].load(tile + args.scales_at, last, lane, bytes);
      if (each_32) scale[0].load(tile + args.scales_at, last - 1, lane, bytes);
      if constexpr (offsets) {
        OfGroup offset;
        XSums x_sums;
        sum_x(x, each_32, x_sums);
        offset.load(tile + args.offsets_at, last, lane, 4);
        add_offsets(offset, x_sums.of[1]);
        if (each_32) {
          offset.load(tile + args.offsets_at, last - 1, lane, 4);
          add_offsets(offset, x_sums.of[0]);
        }
      }
    }
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      uint32_t a[2][2][4];
      decode(tile, half, 0, p, lane, a[0]);
      decode(tile, half, 1, p, lane, a[1]);
#pragma unroll
      for (int c = 0; c < columns; ++c) {
        if constexpr (!grouped) {
          multiply32(sum[p][c], a[0], x, 0, c);
          multiply32(sum[p][c], a[1], x, 1, c);
        } else {
          Acc part[4] = {0, 0, 0, 0};
          multiply32(part, a[0], x, 0, c);
          if (each_32) add_group(part, scale[0].v[p], sum[p][c]);
          multiply32(part, a[1], x, 1, c);
          add_group(part, scale[1].v[p], sum[p][c]);
        }
      }
    }
  }
};

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

// Copy: how a warp's tiles come into shared memory (start, wait), what to wait for before x is read (before_x), and how the sums of blocks that share k meet and
// become outputs (meet).
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

  char* ring = shared_memory() + barrier_bytes + warp * stages * args.tile_bytes;
  Copy copy(shared_memory(), ring, args, warp, lane);
  for (int i = 0; i < stages; ++i) copy.start(i < count, i, weight + i * stride);

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

  block_sync();  // nobody reads tiles any more: their memory takes the sums, [warp][columns][64 channels][8]
  Sum* sums = reinterpret_cast<Sum*>(shared_memory() + barrier_bytes);
  constexpr int warp_sums = columns * tile_n * 8;
#pragma unroll
  for (int p = 0; p < pieces; ++p) {
#pragma unroll
    for (int c = 0; c < columns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = 16 * p + lane / 4 + i / 2 * 8;
        sums[warp * warp_sums + (c * tile_n + channel) * 8 + lane % 4 * 2 + i % 2] = multiply.sum[p][c][i];
      }
    }
  }
  block_sync();
  const int64_t m0 = static_cast<int64_t>(block_y()) * (8 * columns), n0 = static_cast<int64_t>(block_z()) * tile_n;
  const int rows = call.m - m0 < 8 * columns ? static_cast<int>(call.m - m0) : 8 * columns;
  // Element e: of row e / 64 the channel e % 64.
  auto sum_of = [&](int of_side, int e) {
    return sums + of_side * warps * warp_sums + (e / tile_n / 8 * tile_n + e % tile_n) * 8 + e / tile_n % 8;
  };
  for (int e = thread(); e < rows * tile_n; e += threads()) {
    for (int s = 0; s < sides; ++s) {
      Sum* const of_warps = sum_of(s, e);
      Sum v = of_warps[0];
      for (int w = 1; w < warps; ++w) v += of_warps[w * warp_sums];
      of_warps[0] = v;
    }
  }
  Copy::template meet<bits, Sum>(args, rows, m0, n0, sum_of);
}

}  // namespace halfbyte::cuda
