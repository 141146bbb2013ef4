// A packed weight -> a row-major matrix of float16 or bfloat16, for products of many rows that another library computes.
//
// A block takes a tile, a warp 16 channels x 64 k of it. In the order of layout.h a lane's 16 bytes hold, for each of two
// channels, runs of eight k: 16 bytes of y each. The four lanes of a channel write 64 bytes side by side, and the warp's
// next store the 64 bytes after them, so every line of y is written whole without a detour through shared memory.
#pragma once
#include "cuda/finish.cuh"
#include "cuda/layout.h"
#include "cuda/values.cuh"

namespace halfbyte::cuda {

struct DequantizeArgs {
  halfbyte_cuda_dequantize call;
  int k_tiles, tile_bytes, scales_at, offsets_at;  // of a tile (layout.h)
  int group_shift;                                 // group = 1 << group_shift; below 0: no groups
};

constexpr int dequantize_threads = 32 * pieces_side_by_side * tile_k / 64;

// Eight codes that lie in two words: of 4 bits in their low nibbles, the bytes in the order 0 2 1 3; of 8 bits, plus 128.
// A byte behind the exponent of 2^23 is 2^23 + byte.
template <int bits>
HALFBYTE_DEVICE void decode_run(uint32_t first, uint32_t second, float (&c)[8]) {
  constexpr float excess = 8388608.0f + (bits == 4 ? 8 : 128);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int byte = bits == 4 && (j % 4 == 1 || j % 4 == 2) ? 3 - j % 4 : j % 4;
    c[j] = add_rn(bits_to_float(permute(j < 4 ? first : second, 0x4b000000u, 0x7440 | byte)), -excess);
  }
}

template <int bits>
HALFBYTE_KERNEL(dequantize_threads, 4) dequantize_tiles(const DequantizeArgs args) {
  const halfbyte_cuda_dequantize& call = args.call;
  const int lane = thread() % 32, warp = thread() / 32;
  const int column = warp % pieces_side_by_side, depth = warp / pieces_side_by_side;  // of the 64 k
  const int tile_row = block_x() / args.k_tiles, tile_column = block_x() - tile_row * args.k_tiles;
  const uint8_t* const tile = call.weight + static_cast<int64_t>(block_x()) * args.tile_bytes;

  constexpr int count = bits / 4;  // pieces of 16 channels x 64 k
  Word4 piece[count];
#pragma unroll
  for (int p = 0; p < count; ++p) {
    piece[p] = load16(tile + ((count * depth + p) * pieces_side_by_side + column) * piece_bytes + lane * lane_bytes);
  }
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int channel = 16 * column + lane / 4 + 8 * upper;
    const int64_t n = static_cast<int64_t>(tile_row) * tile_n + channel;
    if (n >= call.n) continue;
    const float scale = call.scale[n];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int in_tile = 64 * depth + 32 * half + 8 * (lane % 4);
      const int k = tile_column * tile_k + in_tile;
      if (k >= call.k) continue;
      float v[8];
      if constexpr (bits == 4) {
        const uint32_t first = half ? piece[0].z : piece[0].x, second = half ? piece[0].w : piece[0].y;
        decode_run<bits>(first >> (4 * upper) & 0x0f0f0f0fu, second >> (4 * upper) & 0x0f0f0f0fu, v);
      } else {
        const Word4& p = piece[half];
        decode_run<bits>((upper ? p.y : p.x) ^ 0x80808080u, (upper ? p.w : p.z) ^ 0x80808080u, v);
      }
      if (args.group_shift >= 0) {
        const int at = (in_tile >> args.group_shift) * tile_n + (lane / 4 * pieces_side_by_side + column) * 2 + upper;
        const float group_scale =
            load_as_float(tile + args.scales_at, at, call.format.scale_bytes == 2 ? HALFBYTE_F16 : HALFBYTE_F32);
        const float offset = call.format.offsets ? load_as_float(tile + args.offsets_at, at, HALFBYTE_F32) : 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          v[j] = mul_rn(v[j], group_scale);
          if (call.format.offsets) v[j] = add_rn(v[j], offset);
        }
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = mul_rn(v[j], scale);
      store_halves8(row_of(call.y, n, call.ldy, 2), k, call.y_type, v);
    }
  }
}

}  // namespace halfbyte::cuda
