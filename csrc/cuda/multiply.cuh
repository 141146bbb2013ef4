// What a warp does with a tile of a weight: decode it piece by piece and multiply it by rows of x, with the mma of x's type.
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

  HALFBYTE_DEVICE void load(const char* at, int group, int lane, int bytes, float factor) {
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
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      v[p][0] *= factor;
      v[p][1] *= factor;
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
          const Word2 v = there ? load8(row + at) : Word2{0, 0};
          x.b[h][c][0] = bits == 4 ? permute(v.x, 0, quad_order4) : v.x;
          x.b[h][c][1] = bits == 4 ? permute(v.y, 0, quad_order4) : v.y;
        } else {
          const Word4 v = there ? load16(row + at * 2) : Word4{0, 0, 0, 0};
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

  // Operand A of 16 channels x 64 k of a tile, of each 32 k one m16n8k32 or two m16n8k16. p: which 16 channels.
  HALFBYTE_DEVICE static void decode(const char* codes, int half, int p, int lane, uint32_t (&a)[2][2][4]) {
    if constexpr (bits == 4) {
      const char* at = codes + (half * pieces + p) * piece_bytes + lane * lane_bytes;
      const Word4 q = *reinterpret_cast<const Word4*>(at);
      if constexpr (integer) {
        decode4_s8(q.x, q.y, a[0][0]);
        decode4_s8(q.z, q.w, a[1][0]);
      } else {
        decode4<x_type>(q.x, a[0][0]);
        decode4<x_type>(q.y, a[0][1]);
        decode4<x_type>(q.z, a[1][0]);
        decode4<x_type>(q.w, a[1][1]);
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const char* at = codes + ((half * 2 + h) * pieces + p) * piece_bytes + lane * lane_bytes;
        const Word4 q = *reinterpret_cast<const Word4*>(at);
        if constexpr (integer) {
          a[h][0][0] = q.x;
          a[h][0][1] = q.y;
          a[h][0][2] = q.z;
          a[h][0][3] = q.w;
        } else {
          decode8<x_type>(q.x, q.y, a[h][0]);
          decode8<x_type>(q.z, q.w, a[h][1]);
        }
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
      to[i] = fma_rn(static_cast<float>(part[i]), scale[i / 2], to[i]);
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
      constexpr float factor = integer && bits == 4 ? 0.0625f : 1.0f;  // the codes of decode4_s8 are 16 times as large
      scale[1].load(tile + args.scales_at, last, lane, bytes, factor);
      if (each_32) scale[0].load(tile + args.scales_at, last - 1, lane, bytes, factor);
      if constexpr (offsets) {
        OfGroup offset;
        XSums x_sums;
        sum_x(x, each_32, x_sums);
        offset.load(tile + args.offsets_at, last, lane, 4, 1.0f);
        add_offsets(offset, x_sums.of[1]);
        if (each_32) {
          offset.load(tile + args.offsets_at, last - 1, lane, 4, 1.0f);
          add_offsets(offset, x_sums.of[0]);
        }
      }
    }
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      uint32_t a[2][2][4];
      decode(tile, half, p, lane, a);
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

}  // namespace halfbyte::cuda
