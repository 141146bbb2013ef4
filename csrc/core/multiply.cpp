// Rows of codes times packed weights: the loops around the micro-kernels.
#include "core/multiply.h"

#include <algorithm>

#include "core/linear.h"
#include "core/workspace.h"

namespace halfbyte {
namespace {

constexpr int64_t block_bytes = int64_t{512} << 10;
// A task is worth some 12 us (four grains of the kernel): taking one costs a cache line that travels between cores.
constexpr int64_t task_grains = 4, most_tasks_per_thread = 16;
// Rows per thread from which sharing by rows pays.
constexpr int64_t rows_alone = 48;
constexpr int tile_sums = std::max(max_mr, max_accumulators) * panel_width;

thread_local Workspace workspace;  // strips and tiles of sparse weights
constexpr int32_t no_sums[max_sparse_mr] = {};

int64_t size_of(DType type) { return type == DType::f32 || type == DType::i32 ? 4 : 2; }

int64_t multiplications(std::span<const Product> products, int64_t rows) {
  int64_t work = 0;
  for (const Product& p : products) work += rows * (p.packed->stored() + (p.gate ? p.gate->stored() : 0));
  return work;
}

}  // namespace

bool same_codes(const PackedWeight& a, const PackedWeight& b) {
  return a.k == b.k && a.format.op == b.format.op && a.format.groups.quads == b.format.groups.quads &&
         a.format.activation_group == b.format.activation_group;
}

const GemmKernel& kernel_of(const PackedWeight& packed, uint32_t isas) {
  return select<GemmKernel>(packed.format.op->kernels, isas);
}

void describe_codes(const GemmKernel& kernel, const PackedWeight& packed, quantize_rows::Args& a) {
  const WeightFormat& format = packed.format;
  a.k = packed.k;
  a.bits = format.op->activation_bits;
  a.wide = kernel.wide;
  a.group = format.groups.quads * quad;
  a.scale_per_group = format.activation_group > 0;
  a.symmetric = a.scale_per_group;
  a.k_padded = packed.k_padded;
  // Rows a power of two apart would fall into the same few cache sets.
  a.ldc = a.codes_per_row();
  if (a.ldc * a.code_bytes() % 512 == 0) a.ldc += 64;
}

int64_t bytes_of_codes(const quantize_rows::Args& a, int64_t rows) {
  return round_up(round_up(rows * a.ldc * a.code_bytes(), 64) + rows * 4 * (a.scales_per_row() + a.sums_per_row() + 1), 64);
}

void place_codes(quantize_rows::Args& a, int64_t rows, uint8_t* memory) {
  a.codes = memory;
  a.scale = reinterpret_cast<float*>(memory + round_up(rows * a.ldc * a.code_bytes(), 64));
  a.sum = reinterpret_cast<int32_t*>(a.scale + rows * a.scales_per_row());
  a.zero = a.sum + rows * a.sums_per_row();
}

int useful_threads(const GemmKernel& kernel, std::span<const Product> products, int64_t rows, int wanted) {
  return static_cast<int>(std::min<int64_t>(wanted, 1 + multiplications(products, rows) / (2 * kernel.grain)));
}

Multiplication::Multiplication(const GemmKernel& kernel, std::span<const Product> products, const quantize_rows::Args& a,
                               int64_t first_row, int64_t rows, int64_t all_rows, int threads)
    : kernel(kernel),
      shape(products[0].packed->grouped() ? kernel.grouped : kernel.plain),
      products(products),
      a(a),
      first_row(first_row),
      rows(rows),
      all_rows(all_rows),
      panels(0),
      work(multiplications(products, rows)) {
  for (const Product& p : products) panels += p.packed->panels();
  by_rows = rows >= std::max<int64_t>(rows_alone, shape.mr) * threads || panels < threads;
  strips = by_rows ? round_up(ceil_div(rows, shape.mr), threads) : rows <= shape.alone ? 1 : ceil_div(rows, shape.mr);
  steps_per_strip = ceil_div(rows, shape.row_step) / strips;
  longer_strips = ceil_div(rows, shape.row_step) % strips;
  largest = (steps_per_strip + (longer_strips > 0)) * shape.row_step;
  const int64_t strip_bytes = std::max<int64_t>(1, largest * a.ldc * a.code_bytes());
  blocks = ceil_div(strips, std::max<int64_t>(1, block_bytes / strip_bytes));
  if (by_rows) blocks = std::min(round_up(blocks, threads), strips);
  const int64_t widest = std::clamp<int64_t>(shape.accumulators / largest, 1, max_panels);
  group = by_rows ? widest : std::min(widest, ceil_div(panels, threads));
  groups = 0;
  for (const Product& p : products) groups += ceil_div(p.packed->panels(), group);
  // A task walks neighboring groups: the kernels fetch ahead, and what they fetch should be their own.
  const int64_t per_thread = work / (task_grains * kernel.grain) / threads;
  const int64_t tasks = threads * std::clamp<int64_t>(per_thread, 1, most_tasks_per_thread);
  span = std::clamp<int64_t>(ceil_div(groups * blocks, tasks), 1, groups);
  spans = ceil_div(groups, span);
}

// Nearly equal, in whole row steps: no kernel likes a last strip of one row. Without a division, for this is asked per tile.
Piece Multiplication::strip_rows(int64_t index) const {
  const int64_t begin = index * steps_per_strip + std::min(index, longer_strips);
  const int64_t steps = steps_per_strip + (index < longer_strips);
  return {std::min(begin * shape.row_step, rows), std::min((begin + steps) * shape.row_step, rows)};
}

// By rows: those of the strips that will be this thread's, so that they are in its cache.
Piece Multiplication::rows_to_quantize(const Team& team) const {
  if (!by_rows) return piece(rows, team);
  const Piece mine = piece(blocks, team);
  return {strip_rows(piece(strips, mine.begin, blocks).begin).begin, strip_rows(piece(strips, mine.end, blocks).begin).begin};
}

// e comes with rows, columns and what is written where.
void Multiplication::tile(const PackedWeight& packed, Piece r, int64_t panel, int panels, EpilogueArgs& e, const void* codes,
                          const Room& room) const {
  TileArgs tile;
  tile.rows = static_cast<int>(r.end - r.begin);
  tile.panels = panels;
  tile.all_rows = all_rows;
  tile.quads = packed.k_padded / quad;
  tile.a = codes;
  tile.lda = a.ldc;
  tile.b = packed.panel(panel);
  tile.panel_bytes = packed.panel_bytes();
  tile.panel_offsets = packed.offsets() + panel;
  const bool grouped = packed.grouped();
  tile.acc = room.acc;
  tile.t = room.t;
  tile.groups = grouped ? &packed.format.groups : nullptr;
  tile.nf4 = packed.format.nf4;
  tile.sum_stride = a.sums_per_row();
  tile.a_sum = a.sum + r.begin * tile.sum_stride;
  tile.scale_stride = a.scales_per_row();
  tile.a_scale = a.scale_per_group ? a.scale + r.begin * tile.scale_stride : nullptr;
  shape.run(tile);
  e.acc = room.acc;
  e.t = grouped ? room.t : nullptr;
  e.acc_stride = int64_t{panels} * panel_width;
  e.a_scale = a.scale_per_group ? nullptr : a.scale + r.begin;
  e.a_zero = a.symmetric ? nullptr : a.zero + r.begin;
  e.a_sum = tile.a_sum;
  int32_t zeros[max_sparse_mr];
  if (shape.arrange) {
    e.a_sum = no_sums;
    for (int i = 0; i < tile.rows && e.a_zero; ++i) zeros[i] = e.a_zero[i] + shape.offset;
    if (e.a_zero) e.a_zero = zeros;
  }
  const int64_t column = panel * panel_width;
  e.b_scale = packed.scale() + column;
  e.b_sum = packed.sum() + column;
  e.b_total = packed.total() + column;
  if (e.bias) e.bias += column;
  kernel.epilogue(e);
}

void Multiplication::strip(int64_t index, const Product& product, int64_t panel, int panels, const void* codes,
                           const Room& room) const {
  const Piece r = strip_rows(index);
  if (r.begin == r.end) return;  // fewer rows than threads
  const EpilogueArgs& out = product.out;
  const int64_t row = first_row + r.begin, column = panel * panel_width;
  const int64_t c_bytes = size_of(out.c_type);
  char* const c = static_cast<char*>(out.c) + (row * out.ldc + column) * c_bytes;
  EpilogueArgs e = out;
  e.rows = static_cast<int>(r.end - r.begin);
  e.columns = static_cast<int>(std::min<int64_t>(product.packed->n - column, int64_t{panels} * panel_width));
  if (product.far && !shape.arrange) {  // the tiles of sparse weights are wide: the hardware sees a row coming
    // The lines of C come in while the tile multiplies; the epilogue's stores would wait for them.
    for (int i = 0; i < e.rows; ++i) {
      for (int64_t j = 0; j < e.columns * c_bytes; j += 64) __builtin_prefetch(c + i * out.ldc * c_bytes + j, 1, 2);
    }
  }
  e.c = c;
  if (e.residual) {
    e.residual = static_cast<const char*>(out.residual) + (row * out.ldr + column) * size_of(out.residual_type);
  }
  if (e.factor) e.factor += row * e.factor_stride + column;
  if (!product.gate) return tile(*product.packed, r, panel, panels, e, codes, room);

  EpilogueArgs gate{};
  gate.rows = e.rows;
  gate.columns = e.columns;
  gate.bias = product.gate_bias;
  gate.activation = out.activation;
  gate.c = room.factor;
  gate.ldc = int64_t{panels} * panel_width;
  gate.c_type = DType::f32;
  tile(*product.gate, r, panel, panels, gate, codes, room);
  e.activation = Activation::none;
  e.factor = room.factor;
  e.factor_stride = gate.ldc;
  tile(*product.packed, r, panel, panels, e, codes, room);
}

void Multiplication::arrange(Piece block, const Room& room) const {
  for (int64_t i = block.begin; i < block.end; ++i) {
    const Piece r = strip_rows(i);
    if (r.begin == r.end) continue;
    shape.arrange({.rows = static_cast<int>(r.end - r.begin), .all_rows = all_rows, .k_padded = a.k_padded,
                   .a = static_cast<const uint8_t*>(a.codes) + r.begin * a.ldc * a.code_bytes(), .lda = a.ldc,
                   .strip = room.strips + (i - block.begin) * room.strip_bytes});
  }
}

void Multiplication::run(const Team& team, const Shares& shares) const {
  if (!shape.arrange) {
    alignas(64) int32_t acc[tile_sums];
    alignas(64) float t[tile_sums], factor[tile_sums];
    return run(team, shares, {.acc = acc, .t = t, .factor = factor, .strips = nullptr, .strip_bytes = 0});
  }
  // All that any task can ask for, or the workspace would grow with who takes which.
  const int64_t sums = largest * group * panel_width * 4, strip_bytes = shape.strip_bytes(static_cast<int>(largest), a.k_padded);
  uint8_t* const memory = workspace.reserve(2 * sums + ceil_div(strips, blocks) * strip_bytes);
  run(team, shares, {.acc = reinterpret_cast<int32_t*>(memory), .t = reinterpret_cast<float*>(memory),
                     .factor = reinterpret_cast<float*>(memory + sums), .strips = memory + 2 * sums, .strip_bytes = strip_bytes});
}

void Multiplication::run(const Team& team, const Shares& shares, const Room& room) const {
  int64_t arranged = -1;
  shares.run(team, blocks * spans, [&](int64_t task) {
    const Piece block = piece(strips, task / spans, blocks);
    if (shape.arrange && task / spans != arranged) arrange(block, room);
    arranged = task / spans;
    const int64_t begin = task % spans * span, end = std::min(begin + span, groups);
    const Product* product = products.data();
    int64_t first = 0;  // group of the product
    for (int64_t g = begin; g < end; ++g) {
      // The product that the group is of; one without columns has none.
      for (int64_t own; g >= first + (own = ceil_div(product->packed->panels(), group)); ++product) first += own;
      const int64_t panel = (g - first) * group;
      const int count = static_cast<int>(std::min(group, product->packed->panels() - panel));
      for (int64_t i = block.begin; i < block.end; ++i) {
        const uint8_t* const codes = shape.arrange ? room.strips + (i - block.begin) * room.strip_bytes
                                                   : static_cast<const uint8_t*>(a.codes) +
                                                         strip_rows(i).begin * a.ldc * a.code_bytes();
        strip(i, *product, panel, count, codes, room);
      }
    }
  });
}

}  // namespace halfbyte
