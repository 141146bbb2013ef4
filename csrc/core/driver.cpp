// One parallel region per call:
//
//   for each chunk of rows (its codes fit a few MiB, so that any M runs in bounded memory)
//     quantize the chunk, through a norm where one is given, rows split over the threads    barrier
//     multiply: tasks of a block of strips x a span of panels; each thread has its share, then helps the others
//       for each strip of the block      one tile, then its epilogue while the sums are in L1
#include "core/driver.h"

#include <algorithm>
#include <memory>

#include "core/cpu_features.h"
#include "core/workspace.h"

namespace halfbyte {
namespace {

constexpr int64_t chunk_bytes = int64_t{4} << 20;

thread_local Workspace workspace;  // the quantized chunk, and a row for each thread that normalizes

// Of rows of `a`, which go through a norm into its codes.
norm::Args norm_of(const norm::Parameters& through, const quantize_rows::Args& a, float* scratch) {
  norm::Args n{};
  static_cast<norm::Parameters&>(n) = through;
  n.k = a.k;
  n.x = a.x;
  n.ldx = a.ldx;
  n.x_type = a.x_type;
  n.codes = &a;
  n.scratch = scratch;
  return n;
}

}  // namespace

void gemm(std::span<const Product> products, quantize_rows::Args a, const norm::Parameters* through, int64_t m, int threads) {
  const PackedWeight& packed = *products[0].packed;
  const GemmKernel& kernel = kernel_of(packed, active_isas());
  const quantize_rows::Kernel& quantizer = quantize_rows::select();
  const norm::Kernel* const normalizer = through ? &norm::select() : nullptr;
  describe_codes(kernel, packed, a);
  const int64_t mr = (packed.grouped() ? kernel.grouped : kernel.plain).alone, row_bytes = a.ldc * a.code_bytes();
  const int64_t affordable = chunk_bytes / std::max<int64_t>(1, row_bytes) / mr * mr;
  const int64_t chunk = std::min(m, std::max(mr, affordable));
  threads = useful_threads(kernel, products, m, threads > 0 ? threads : default_threads());
  const int64_t code_bytes = bytes_of_codes(a, chunk), scratch_bytes = through ? round_up(packed.k * 4, 64) : 0;
  uint8_t* const memory = workspace.reserve(code_bytes + threads * scratch_bytes);
  place_codes(a, chunk, memory);

  Share few[8];
  std::unique_ptr<Share[]> many(threads > 8 ? new Share[threads] : nullptr);
  parallel(threads, [&](Team& team) {
    Shares shares(many ? many.get() : few);
    for (int64_t first = 0; first < m; first += chunk) {
      const int64_t rows = std::min(chunk, m - first);
      quantize_rows::Args mine = a;
      mine.x = static_cast<const char*>(a.x) + first * a.ldx * (a.x_type == DType::f32 ? 4 : 2);
      const Multiplication multiplication(kernel, products, mine, first, rows, m, team.size);
      const Piece r = multiplication.rows_to_quantize(team);
      if (through) {
        uint8_t* const scratch = memory + code_bytes + team.rank * scratch_bytes;
        normalizer->rows(norm_of(*through, mine, reinterpret_cast<float*>(scratch)), r.begin, r.end);
      } else {
        quantizer.rows(mine, r.begin, r.end);
      }
      shares.next_phase(team);
      multiplication.run(team, shares);
      if (first + chunk < m) team.barrier();
    }
  });
}

}  // namespace halfbyte
