// The weights of a linear layer as the GPU kernels read them: one layout for every architecture, on host and device.
//
// A tile is 64 output channels x 128 k: what one warp multiplies by at a time, one contiguous piece of memory. Tiles of
// the same channels follow each other along k; n and k are padded to whole tiles.
//
//   codes     in the order in which the lanes of a warp hold operand A of mma.m16n8k16 (16-bit activations) and of
//             mma.m16n8k32 (8-bit ones): 16 bytes a lane are
//               4 bits   16 channels x 64 k    word s of lane 4 g + t: channels g and g + 8, k = 16 (s & 2) + 8 t + 4 (s & 1) + j
//                                              low nibbles of bytes 0, 2, 1, 3: channel g, j = 0 .. 3; high ones: channel g + 8
//               8 bits   16 channels x 32 k    word 2 s + u of lane 4 g + t: channel g + 8 u, k = 8 t + 4 s + j, byte j
//             The mma is free to take its k in any order that both operands share; in this one a lane's eight k of
//             a row of activations are neighbours in memory, and a 32-bit word of nibbles gives pairs of 16-bit numbers
//             by one mask. Pieces of 512 bytes, the 16-channel ones side by side: [k / 64 or k / 32][4][32 lanes][16].
//   scales    [128 / group][64] of float16 or float32; none without groups
//   offsets   [128 / group][64] of float32, where the weight is not symmetric
//             The 64 channels in the order [8][4][2] of g, piece of 16 channels, u: a lane's eight are neighbours.
//
// Weights with zeros, of 8 bits and without groups:
//
//   two_of_four   of four consecutive k at most two are stored: per piece of 16 channels x 64 k 512 bytes of codes, operand
//                 A of mma.sp.m16n8k64, then for each piece of the tile 32 words of indices. A lane's 16 bytes are its four
//                 words: word 2 h + u: channel g + 8 u, of the 32 k of half h the quads ("chunks") 2 t and 2 t + 1 as the mma
//                 counts them, two codes each. It counts the quads 0 .. 7 of a half as 0 2 4 6 1 3 5 7 of the weight, so that
//                 operand B is again two times eight neighbours. The word of indices of lane 4 g + t is of channel
//                 g + 8 (t & 1) and half t / 2: four bits per quad, the places of its two codes, the lower one first.
//   blocks        tiles of 64 channels x 64 k, of which only those with something in them are stored, by channel, then k;
//                 starts[n tile] .. starts[n tile + 1] - 1 are a row's tiles, and columns[tile] is k / 64.
//
// The weight is (c * group_scale + offset) * scale[n], c the code: of 8 bits an int8, of 4 bits u - 8. What a
// QuantizedTensor calls zero is offset = -zero * group_scale (of 4 bits (8 - zero) * group_scale), its minimum is minimum
// (+ 8 * group_scale). Padding has the code 0 and, where there are groups, the scale 0.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define HALFBYTE_HD __host__ __device__
#else
#define HALFBYTE_HD
#endif

namespace halfbyte::cuda {

constexpr int tile_n = 64, tile_k = 128;
constexpr int lane_bytes = 16, piece_bytes = 32 * lane_bytes;
constexpr int pieces_side_by_side = tile_n / 16;

HALFBYTE_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum Pattern { dense = 0, two_of_four = 1, blocks = 2 };

struct WeightFormat {
  int bits;         // 4 or 8
  int group;        // 32, 64 or 128 k per scale; 0: none, only the scale of the channel
  int scale_bytes;  // of a group's scale: 2 (float16) or 4 (float32)
  bool offsets;     // needs groups
  int pattern = dense;

  HALFBYTE_HD constexpr int tile_depth() const { return pattern == blocks ? tile_k / 2 : tile_k; }
  HALFBYTE_HD constexpr int code_bytes() const {
    return tile_n * tile_depth() * bits / 8 / (pattern == two_of_four ? 2 : 1);
  }
  HALFBYTE_HD constexpr int index_bytes() const { return pattern == two_of_four ? tile_n * tile_k / 8 : 0; }
  HALFBYTE_HD constexpr int groups() const { return group ? tile_k / group : 0; }  // of a tile
  HALFBYTE_HD constexpr int scales_at() const { return code_bytes() + index_bytes(); }
  HALFBYTE_HD constexpr int offsets_at() const { return scales_at() + groups() * tile_n * scale_bytes; }
  HALFBYTE_HD constexpr int tile_bytes() const { return offsets_at() + (offsets ? groups() * tile_n * 4 : 0); }
};

HALFBYTE_HD constexpr int64_t k_tiles(int64_t k) { return ceil_div(k, tile_k); }  // dense
HALFBYTE_HD constexpr int64_t n_tiles(int64_t n) { return ceil_div(n, tile_n); }

HALFBYTE_HD constexpr int64_t weight_bytes(const WeightFormat& f, int64_t n, int64_t k) {
  return n_tiles(n) * k_tiles(k) * f.tile_bytes();
}

// Where the code of channel n and input feature k is: a byte of the whole weight, and the bit in it.
struct CodePosition {
  int64_t byte;
  int shift;
};

HALFBYTE_HD constexpr CodePosition code_position(const WeightFormat& f, int64_t n, int64_t k, int64_t k_all) {
  const int64_t tile = n / tile_n * k_tiles(k_all) + k / tile_k;
  const int row = static_cast<int>(n % 16), piece_column = static_cast<int>(n % tile_n) / 16;
  const int in_tile = static_cast<int>(k % tile_k), t = in_tile % 32 / 8, s = in_tile % 8 / 4, j = in_tile % 4;
  const int lane = row % 8 * 4 + t, upper = row / 8;
  const int depth = f.bits == 4 ? 64 : 32;  // k of a piece
  int64_t byte = tile * f.tile_bytes();
  byte += (in_tile / depth * pieces_side_by_side + piece_column) * piece_bytes + lane * lane_bytes;
  if (f.bits == 8) return {byte + (2 * s + upper) * 4 + j, 0};
  const int word = in_tile % 64 / 32 * 2 + s;
  return {byte + word * 4 + (j == 1 ? 2 : j == 2 ? 1 : j), 4 * upper};
}

// Of two_of_four: where the code is that the quad of (n, k) stores first (index 0) or second, and the bit of its 2-bit index.
HALFBYTE_HD constexpr CodePosition quad_position(int64_t n, int64_t k, int64_t k_all, int index, bool of_index) {
  const WeightFormat f{8, 0, 4, false, two_of_four};
  const int64_t tile = n / tile_n * k_tiles(k_all) + k / tile_k;
  const int g = static_cast<int>(n % 8), upper = static_cast<int>(n % 16) / 8, in_tile = static_cast<int>(k % tile_k);
  const int piece = in_tile / 64 * pieces_side_by_side + static_cast<int>(n % tile_n) / 16, half = in_tile % 64 / 32;
  const int quad = in_tile % 32 / 4, counted = quad % 2 * 4 + quad / 2;
  const int64_t at = tile * f.tile_bytes();
  if (of_index) {
    const int lane = 4 * g + 2 * half + upper, bit = 4 * counted + 2 * index;
    return {at + f.code_bytes() + piece * 128 + lane * 4 + bit / 8, bit % 8};
  }
  const int lane = 4 * g + counted / 2;
  return {at + piece * piece_bytes + lane * lane_bytes + (2 * half + upper) * 4 + counted % 2 * 2 + index, 0};
}

// Where the scale (or the offset) of channel n and of the group of k is.
HALFBYTE_HD constexpr int64_t scale_position(const WeightFormat& f, int64_t n, int64_t k, int64_t k_all, bool offset) {
  const int64_t tile = n / tile_n * k_tiles(k_all) + k / tile_k;
  const int64_t g = n % 8, piece = n % tile_n / 16, upper = n % 16 / 8;
  const int64_t index = k % tile_k / f.group * tile_n + g * 8 + piece * 2 + upper;
  return tile * f.tile_bytes() + (offset ? f.offsets_at() + index * 4 : f.scales_at() + index * f.scale_bytes);
}

}  // namespace halfbyte::cuda
