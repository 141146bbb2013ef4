// Rows of codes times packed weights: blocking, sharing over threads, tiles and their epilogues.
#pragma once
#include <span>

#include "core/gemm.h"
#include "core/packed_weight.h"
#include "core/share.h"
#include "ops/quantize_rows/op.h"

namespace halfbyte {

// One weight that rows are multiplied with, and what becomes of the sums: c = activation(x W^T + bias) + residual, or,
// with a gate, c = (x W^T + bias) * activation(x G^T + gate_bias) + residual. out.factor may be given instead of a gate.
struct Product {
  const PackedWeight* packed = nullptr;
  EpilogueArgs out{};  // c, ldc, c_type, bias, activation, factor and residual are the caller's
  const PackedWeight* gate = nullptr;  // of the format and shape of `packed`
  const float* gate_bias = nullptr;
  bool far = true;  // c is not in the caches: fetch its lines ahead (3 % of a tile's time where they are)
};

// Most weights of one multiplication: query, key and value.
constexpr int max_products = 3;

// True where both weights take the same codes and run on the same kernel, so that they can share a multiplication.
bool same_codes(const PackedWeight& a, const PackedWeight& b);

const GemmKernel& kernel_of(const PackedWeight& packed, uint32_t isas);

// Fills in what `packed` wants of its activations: everything but x, the static scale and the memory.
void describe_codes(const GemmKernel& kernel, const PackedWeight& packed, quantize_rows::Args& a);
int64_t bytes_of_codes(const quantize_rows::Args& a, int64_t rows);  // with scales, sums and zero points
void place_codes(quantize_rows::Args& a, int64_t rows, uint8_t* memory);

// How many of `wanted` threads are worth waking.
int useful_threads(const GemmKernel& kernel, std::span<const Product> products, int64_t rows, int wanted);

// How rows of codes are cut, and the work on a piece. Two ways to share it:
//   by rows      every thread quantizes and multiplies rows of its own and reads the whole weight; no codes travel between
//                cores. Pays once a thread has enough rows to use each weight often.
//   by columns   every thread reads a part of the weight, and all rows.
//
// The codes of a block stay in half of L2 from task to task; a panel comes from L3 or DRAM once per block and from L2
// for every later strip. The pieces are the same in every call, so a small layer's weights and results stay in the L2 of
// the same core.
class Multiplication {
 public:
  // Products agree in same_codes(); `products` and `a` outlive this. first_row: of the outputs, for row 0 of the codes.
  // all_rows: of the call, of which these may be a chunk.
  Multiplication(const GemmKernel& kernel, std::span<const Product> products, const quantize_rows::Args& a,
                 int64_t first_row, int64_t rows, int64_t all_rows, int threads);

  Piece rows_to_quantize(const Team& team) const;
  void run(const Team& team, const Shares& shares) const;  // once the rows are quantized

 private:
  // Where a thread computes a tile.
  struct Room {
    int32_t* acc;
    float *t, *factor;
    uint8_t* strips;  // of a block, for sparse weights
    int64_t strip_bytes;
  };

  Piece strip_rows(int64_t index) const;
  void run(const Team& team, const Shares& shares, const Room& room) const;
  void arrange(Piece block, const Room& room) const;
  void strip(int64_t index, const Product& product, int64_t panel, int panels, const void* codes, const Room& room) const;
  void tile(const PackedWeight& packed, Piece r, int64_t panel, int panels, EpilogueArgs& e, const void* codes,
            const Room& room) const;

  const GemmKernel& kernel;
  const GemmTile& shape;
  const std::span<const Product> products;
  const quantize_rows::Args& a;
  const int64_t first_row, rows, all_rows;
  int64_t panels, work;  // over all products; multiplications
  int64_t largest;       // rows of a strip
  bool by_rows;
  int64_t strips, steps_per_strip, longer_strips;  // strips of nearly equal height, in the kernel's row steps
  int64_t blocks;                                  // of strips
  int64_t group, groups;                           // panels of one tile; how many such groups over all products
  int64_t span, spans;                             // groups of one task; tasks = blocks x spans
};

}  // namespace halfbyte
