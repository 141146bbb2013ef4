// One parallel region per call:
//
//   for each chunk of rows (its codes fit a few MiB, so that any M runs in bounded memory)
//     quantize the chunk, rows split over the threads          barrier
//     multiply: a grid of threads over strips of rows x panels of columns
//       for each block of strips whose codes stay in half of L2
//         for each group of panels       the panel comes from L3 or DRAM once per block, from L2 for every later strip
//           for each strip               one tile, then its epilogue while the sums are in L1
#include "core/driver.h"

#include <algorithm>

#include "core/parallel.h"

namespace halfbyte {
namespace {

constexpr int64_t chunk_bytes = int64_t{4} << 20;
constexpr int64_t block_bytes = int64_t{512} << 10;

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

// [0, total) in `parts` nearly equal pieces.
struct Piece {
  int64_t begin, end;
};
Piece piece(int64_t total, int64_t index, int64_t parts) { return {total * index / parts, total * (index + 1) / parts}; }

// Threads as a grid: `down` over the strips, `size / down` over the panels; the one with the smallest largest share.
// Ties go to fewer splits of the rows, which reads each weight on one core only.
int split_rows(int size, int64_t strips, int64_t panels) {
  int best = 1;
  int64_t best_share = INT64_MAX;
  for (int down = 1; down <= size; ++down) {
    if (size % down) continue;
    const int across = size / down;
    const int64_t share = ((strips + down - 1) / down) * ((panels + across - 1) / across);
    if (share < best_share) best_share = share, best = down;
  }
  return best;
}

struct Multiplication {
  const GemmKernel& kernel;
  const PackedWeight& packed;
  const quantize_rows::Args& a;
  const EpilogueArgs& out;
  int64_t first_row, rows, strips;

  void strip(int64_t index, int64_t panel, int panels) const;
  void run(const Team& team) const;
};

void Multiplication::strip(int64_t index, int64_t panel, int panels) const {
  alignas(64) int32_t acc[std::max(max_mr, 12 * max_panels) * panel_width];
  const Piece r = piece(rows, index, strips);
  const int64_t code_bytes = kernel.wide ? 2 : 1;
  TileArgs tile;
  tile.rows = static_cast<int>(r.end - r.begin);
  tile.panels = panels;
  tile.quads = packed.k_padded / quad;
  tile.a = static_cast<const uint8_t*>(a.codes) + r.begin * a.ldc * code_bytes;
  tile.lda = a.ldc;
  tile.b = packed.panel(panel);
  tile.panel_bytes = packed.panel_bytes();
  tile.acc = acc;
  kernel.tile(tile);

  const int64_t row = first_row + r.begin, column = panel * panel_width;
  EpilogueArgs e = out;
  e.rows = tile.rows;
  e.columns = static_cast<int>(std::min<int64_t>(packed.n - column, int64_t{panels} * panel_width));
  e.acc = acc;
  e.acc_stride = int64_t{panels} * panel_width;
  e.a_scale = a.scale + r.begin;
  e.a_zero = a.zero + r.begin;
  e.a_sum = a.sum + r.begin;
  e.b_scale = packed.scale() + column;
  e.b_sum = packed.sum() + column;
  if (e.bias) e.bias += column;
  const int64_t c_bytes = out.c_type == DType::f32 || out.c_type == DType::i32 ? 4 : 2;
  e.c = static_cast<char*>(out.c) + (row * out.ldc + column) * c_bytes;
  if (e.residual) {
    const int64_t bytes = out.residual_type == DType::f32 ? 4 : 2;
    e.residual = static_cast<const char*>(out.residual) + (row * out.ldr + column) * bytes;
  }
  kernel.epilogue(e);
}

void Multiplication::run(const Team& team) const {
  const int down = split_rows(team.size, strips, packed.panels());
  const int across = team.size / down;
  const Piece mine = piece(strips, team.rank / across, down);
  const Piece panels = piece(packed.panels(), team.rank % across, across);
  const int64_t largest = (rows + strips - 1) / strips;
  const int64_t group = std::clamp<int64_t>(kernel.accumulators / largest, 1, max_panels);
  const int64_t strip_bytes = largest * a.ldc * (kernel.wide ? 2 : 1);
  const int64_t block = std::max<int64_t>(1, block_bytes / std::max<int64_t>(1, strip_bytes));
  for (int64_t s = mine.begin; s < mine.end; s += block) {
    for (int64_t p = panels.begin; p < panels.end; p += group) {
      const int count = static_cast<int>(std::min(group, panels.end - p));
      for (int64_t i = s; i < std::min(s + block, mine.end); ++i) strip(i, p, count);
    }
  }
}

}  // namespace

void gemm(const GemmKernel& kernel, const quantize_rows::Kernel& quantizer, const PackedWeight& packed, GemmCall call) {
  quantize_rows::Args& a = call.a;
  a.wide = kernel.wide;
  a.k_padded = packed.k_padded;
  const int64_t code_bytes = a.wide ? 2 : 1;
  // Rows a power of two apart would fall into the same few cache sets.
  a.ldc = a.k_padded + (a.k_padded * code_bytes % 512 == 0 ? 64 : 0);
  const int64_t mr = kernel.mr, row_bytes = a.ldc * code_bytes;
  const int64_t affordable = chunk_bytes / std::max<int64_t>(1, row_bytes) / mr * mr;
  const int64_t chunk = std::min(call.m, std::max(8 * mr, affordable));

  const int64_t codes_bytes = round_up(chunk * row_bytes, 64);
  a.codes = workspace.reserve(codes_bytes + chunk * 12);
  a.scale = reinterpret_cast<float*>(static_cast<uint8_t*>(a.codes) + codes_bytes);
  a.zero = reinterpret_cast<int32_t*>(a.scale + chunk);
  a.sum = a.zero + chunk;

  const int wanted = call.threads > 0 ? call.threads : default_threads();
  const int64_t useful = 1 + call.m * packed.n_padded * packed.k_padded / (2 * kernel.grain);
  parallel(static_cast<int>(std::min<int64_t>(wanted, useful)), [&](Team& team) {
    for (int64_t first = 0; first < call.m; first += chunk) {
      const int64_t rows = std::min(chunk, call.m - first);
      quantize_rows::Args mine = a;
      mine.x = static_cast<const char*>(a.x) + first * a.ldx * (a.x_type == DType::f32 ? 4 : 2);
      const Piece r = piece(rows, team.rank, team.size);
      quantizer.rows(mine, r.begin, r.end);
      team.barrier();
      Multiplication{kernel, packed, mine, call.out, first, rows, (rows + mr - 1) / mr}.run(team);
      if (first + chunk < call.m) team.barrier();
    }
  });
}

}  // namespace halfbyte
