// One parallel region per call:
//
//   for each chunk of rows (its codes fit a few MiB, so that any M runs in bounded memory)
//     quantize the chunk, rows split over the threads          barrier
//     multiply: tasks of a block of strips x a span of panels; each thread has its share, then helps the others
//       for each strip of the block      one tile, then its epilogue while the sums are in L1
//
// The codes of a block stay in half of L2 from task to task; a panel comes from L3 or DRAM once per block and from L2
// for every later strip. The shares are the same in every call, so a small layer's weights and results stay in the L2 of
// the same core; the helping is for shared machines, where a core may lose a tenth of its time.
#include "core/driver.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "core/linear.h"
#include "core/parallel.h"

namespace halfbyte {
namespace {

constexpr int64_t chunk_bytes = int64_t{4} << 20;
constexpr int64_t block_bytes = int64_t{512} << 10;
// A task is worth some 12 us (four grains of the kernel): taking one costs a cache line that travels between cores.
constexpr int64_t task_grains = 4, most_tasks_per_thread = 16;
// Rows per thread from which sharing by rows pays.
constexpr int64_t rows_alone = 48;

// The quantized chunk; one per calling thread, kept for the next call.
struct Workspace {
  Buffer buffer;

  uint8_t* reserve(int64_t bytes) {
    if (buffer.size() < bytes) {
      buffer = Buffer();  // first give back, then take
      buffer = Buffer(bytes);
    }
    return buffer.data();
  }
};
thread_local Workspace workspace;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// [0, total) in `parts` nearly equal pieces.
struct Piece {
  int64_t begin, end;
};
Piece piece(int64_t total, int64_t index, int64_t parts) { return {total * index / parts, total * (index + 1) / parts}; }

// The tasks of one thread that nobody has taken yet, per turn. Chunks take turns: one counter is set back while the other
// is in use. On a cache line of its own, which nobody else touches until help is due.
struct alignas(64) Share {
  std::atomic<int64_t> taken[2] = {0, 0};
};

// One chunk of rows: how it is cut, and the work on a piece. Two ways to share it:
//   by rows      every thread quantizes and multiplies rows of its own and reads the whole weight; no codes travel between
//                cores. Pays once a thread has enough rows to use each weight often.
//   by columns   every thread reads a part of the weight, and all rows.
struct Multiplication {
  Multiplication(const GemmKernel& kernel, const PackedWeight& packed, const quantize_rows::Args& a,
                 const EpilogueArgs& out, int64_t first_row, int64_t rows, int threads);

  Piece rows_to_quantize(const Team& team) const;
  void run(const Team& team, Share* shares, int turn) const;

 private:
  Piece strip_rows(int64_t index) const;
  void strip(int64_t index, int64_t panel, int panels) const;

  const GemmKernel& kernel;
  const GemmTile& shape;
  const PackedWeight& packed;
  const quantize_rows::Args& a;
  const EpilogueArgs& out;
  const int64_t first_row, rows;
  const bool by_rows;
  const int64_t strips, steps_per_strip, longer_strips;  // strips of nearly equal height, in the kernel's row steps
  int64_t blocks;                                        // of strips
  int64_t group, groups;                                 // panels of one tile; how many such groups
  int64_t span, spans;                                   // groups of one task; tasks = blocks x spans
};

Multiplication::Multiplication(const GemmKernel& kernel, const PackedWeight& packed, const quantize_rows::Args& a,
                               const EpilogueArgs& out, int64_t first_row, int64_t rows, int threads)
    : kernel(kernel),
      shape(packed.grouped() ? kernel.grouped : kernel.plain),
      packed(packed),
      a(a),
      out(out),
      first_row(first_row),
      rows(rows),
      by_rows(rows >= rows_alone * threads || packed.panels() < threads),
      strips(by_rows                ? round_up(ceil_div(rows, shape.mr), threads)
             : rows <= shape.alone ? 1
                                   : ceil_div(rows, shape.mr)),
      steps_per_strip(ceil_div(rows, shape.row_step) / strips),
      longer_strips(ceil_div(rows, shape.row_step) % strips) {
  const int64_t largest = (steps_per_strip + (longer_strips > 0)) * shape.row_step;
  const int64_t strip_bytes = std::max<int64_t>(1, largest * a.ldc * a.code_bytes());
  blocks = ceil_div(strips, std::max<int64_t>(1, block_bytes / strip_bytes));
  if (by_rows) blocks = std::min(round_up(blocks, threads), strips);
  const int64_t widest = std::clamp<int64_t>(shape.accumulators / largest, 1, max_panels);
  group = by_rows ? widest : std::min(widest, ceil_div(packed.panels(), threads));
  groups = ceil_div(packed.panels(), group);
  // A task walks neighboring groups: the kernels fetch ahead, and what they fetch should be their own.
  const int64_t work = rows * packed.n_padded * packed.k_padded / (task_grains * kernel.grain);
  const int64_t tasks = threads * std::clamp<int64_t>(work / threads, 1, most_tasks_per_thread);
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
  if (!by_rows) return piece(rows, team.rank, team.size);
  const Piece mine = piece(blocks, team.rank, team.size);
  return {strip_rows(piece(strips, mine.begin, blocks).begin).begin, strip_rows(piece(strips, mine.end, blocks).begin).begin};
}

void Multiplication::strip(int64_t index, int64_t panel, int panels) const {
  constexpr int sums = std::max(max_mr, max_accumulators) * panel_width;
  alignas(64) int32_t acc[sums];
  alignas(64) float t[sums];
  const Piece r = strip_rows(index);
  if (r.begin == r.end) return;  // fewer rows than threads
  TileArgs tile;
  tile.rows = static_cast<int>(r.end - r.begin);
  tile.panels = panels;
  tile.quads = packed.k_padded / quad;
  tile.a = static_cast<const uint8_t*>(a.codes) + r.begin * a.ldc * a.code_bytes();
  tile.lda = a.ldc;
  tile.b = packed.panel(panel);
  tile.panel_bytes = packed.panel_bytes();
  const bool grouped = packed.grouped();
  tile.acc = acc;
  tile.t = t;
  tile.groups = grouped ? &packed.format.groups : nullptr;
  tile.nf4 = packed.format.nf4;
  tile.sum_stride = a.sums_per_row();
  tile.a_sum = a.sum + r.begin * tile.sum_stride;
  tile.scale_stride = a.scales_per_row();
  tile.a_scale = a.scale_per_group ? a.scale + r.begin * tile.scale_stride : nullptr;

  const int64_t row = first_row + r.begin, column = panel * panel_width;
  const int64_t c_bytes = out.c_type == DType::f32 || out.c_type == DType::i32 ? 4 : 2;
  char* const c = static_cast<char*>(out.c) + (row * out.ldc + column) * c_bytes;
  EpilogueArgs e = out;
  e.rows = tile.rows;
  e.columns = static_cast<int>(std::min<int64_t>(packed.n - column, int64_t{panels} * panel_width));
  // The lines of C come in while the tile multiplies; the epilogue's stores would wait for them.
  for (int i = 0; i < e.rows; ++i) {
    for (int64_t j = 0; j < e.columns * c_bytes; j += 64) __builtin_prefetch(c + i * out.ldc * c_bytes + j, 1, 2);
  }
  shape.run(tile);
  e.acc = acc;
  e.t = grouped ? t : nullptr;
  e.acc_stride = int64_t{panels} * panel_width;
  e.a_scale = a.scale_per_group ? nullptr : a.scale + r.begin;
  e.a_zero = a.symmetric ? nullptr : a.zero + r.begin;
  e.a_sum = tile.a_sum;
  e.b_scale = packed.scale() + column;
  e.b_sum = packed.sum() + column;
  e.b_total = packed.total() + column;
  if (e.bias) e.bias += column;
  e.c = c;
  if (e.residual) {
    const int64_t bytes = out.residual_type == DType::f32 ? 4 : 2;
    e.residual = static_cast<const char*>(out.residual) + (row * out.ldr + column) * bytes;
  }
  kernel.epilogue(e);
}

void Multiplication::run(const Team& team, Share* shares, int turn) const {
  for (int helped = 0; helped < team.size; ++helped) {
    const int owner = (team.rank + helped) % team.size;
    const Piece share = piece(blocks * spans, owner, team.size);
    std::atomic<int64_t>& taken = shares[owner].taken[turn];
    for (int64_t task; (task = share.begin + taken.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
      const Piece block = piece(strips, task / spans, blocks);
      const int64_t begin = task % spans * span, end = std::min(begin + span, groups);
      for (int64_t g = begin; g < end; ++g) {
        const int64_t panel = g * group;
        const int count = static_cast<int>(std::min(group, packed.panels() - panel));
        for (int64_t i = block.begin; i < block.end; ++i) strip(i, panel, count);
      }
    }
  }
}

}  // namespace

void gemm(const GemmKernel& kernel, const quantize_rows::Kernel& quantizer, const PackedWeight& packed, GemmCall call) {
  quantize_rows::Args& a = call.a;
  const WeightFormat& format = packed.format;
  a.bits = format.op->activation_bits;
  a.wide = kernel.wide;
  a.group = format.groups.quads * quad;
  a.scale_per_group = format.activation_group > 0;
  a.symmetric = a.scale_per_group;
  a.k_padded = packed.k_padded;
  // Rows a power of two apart would fall into the same few cache sets.
  a.ldc = a.codes_per_row();
  if (a.ldc * a.code_bytes() % 512 == 0) a.ldc += 64;
  const int64_t mr = (packed.grouped() ? kernel.grouped : kernel.plain).alone, row_bytes = a.ldc * a.code_bytes();
  const int64_t affordable = chunk_bytes / std::max<int64_t>(1, row_bytes) / mr * mr;
  const int64_t chunk = std::min(call.m, std::max(mr, affordable));

  const int64_t codes_bytes = round_up(chunk * row_bytes, 64);
  a.codes = workspace.reserve(codes_bytes + chunk * 4 * (a.scales_per_row() + a.sums_per_row() + 1));
  a.scale = reinterpret_cast<float*>(static_cast<uint8_t*>(a.codes) + codes_bytes);
  a.sum = reinterpret_cast<int32_t*>(a.scale + chunk * a.scales_per_row());
  a.zero = a.sum + chunk * a.sums_per_row();

  const int wanted = call.threads > 0 ? call.threads : default_threads();
  const int64_t useful = 1 + call.m * packed.n_padded * packed.k_padded / (2 * kernel.grain);
  const int threads = static_cast<int>(std::min<int64_t>(wanted, useful));
  Share few[8];
  std::unique_ptr<Share[]> many(threads > 8 ? new Share[threads] : nullptr);
  Share* const shares = many ? many.get() : few;
  parallel(threads, [&](Team& team) {
    int turn = 0;
    for (int64_t first = 0; first < call.m; first += chunk, turn = 1 - turn) {
      const int64_t rows = std::min(chunk, call.m - first);
      quantize_rows::Args mine = a;
      mine.x = static_cast<const char*>(a.x) + first * a.ldx * (a.x_type == DType::f32 ? 4 : 2);
      const Multiplication multiplication(kernel, packed, mine, call.out, first, rows, team.size);
      const Piece r = multiplication.rows_to_quantize(team);
      quantizer.rows(mine, r.begin, r.end);
      team.barrier();
      shares[team.rank].taken[1 - turn].store(0, std::memory_order_relaxed);
      multiplication.run(team, shares, turn);
      if (first + chunk < call.m) team.barrier();
    }
  });
}

}  // namespace halfbyte
