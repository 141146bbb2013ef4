// quantize_rows: checks, choice of the kernel, rows split over threads.
#include "ops/quantize_rows/op.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/parallel.h"

namespace halfbyte::quantize_rows {
namespace {

constexpr const Kernel* kernels[] = {
#define KERNEL(isa) &kernel_##isa,
#include "ops/quantize_rows/kernels.inc"
#undef KERNEL
};

// Below this many elements (about 5 us of work) a second thread costs more than it saves.
constexpr int64_t elements_per_thread = 32 * 1024;

}  // namespace

int Args::parts() const { return bits == 16 && !wide ? 2 : 1; }
int64_t Args::code_bytes() const { return bits == 32 ? 4 : wide ? 2 : 1; }
int64_t Args::codes_per_row() const { return k_padded * parts(); }
int64_t Args::scales_per_row() const { return scale_per_group ? sums_per_row() / parts() : 1; }
int64_t Args::sums_per_row() const {
  return group ? std::max<int64_t>(1, (k_padded + group - 1) / group) * parts() : 1;
}

OpTable table() { return op_table<Kernel>("quantize_rows", kernels); }

const Kernel& select() { return halfbyte::select<Kernel>(kernels, active_isas()); }

void run(const Args& args, int64_t m, int threads) {
  check(m >= 0 && args.k >= 0, "quantize_rows: negative shape [", m, ", ", args.k, "]");
  check(args.k_padded >= args.k, "quantize_rows: k_padded ", args.k_padded, " is below k ", args.k);
  check(args.k <= max_k, "quantize_rows: k ", args.k, " exceeds ", max_k, ", beyond which a row's sum overflows int32");
  check(m == 0 || args.k == 0 || (args.x && args.codes), "quantize_rows: x or the codes have no memory");
  check(m == 0 || (args.scale && args.sum), "quantize_rows: scale or sum have no memory");
  check(args.bits == 8 || (args.bits == 16 && args.scale_per_group), "quantize_rows: 16-bit codes have a scale per group");
  check(!args.scale_per_group || (args.group > 0 && args.symmetric), "quantize_rows: scales per group are symmetric");
  check(!args.symmetric || args.static_scale == 0, "quantize_rows: a static scale is asymmetric");
  check(m <= 1 || (args.ldx >= args.k && args.ldc >= args.codes_per_row()), "quantize_rows: rows overlap: strides ", args.ldx,
        " and ", args.ldc, " for ", args.k, " elements");
  check(args.x_type != DType::i32, "quantize_rows: x must be float32, bfloat16 or float16");
  check(args.static_scale == 0 || (std::isfinite(args.static_scale) && args.static_scale >= 0x1p-100f),
        "quantize_rows: a static scale must be finite and at least 2^-100, got ", args.static_scale);
  check(args.static_scale == 0 || (args.static_zero >= -128 && args.static_zero <= 127),
        "quantize_rows: a static zero point must lie in [-128, 127], got ", args.static_zero);
  if (m == 0) return;
  const Kernel& kernel = select();
  const int64_t useful = 1 + m * args.k / elements_per_thread;
  const int wanted = threads > 0 ? threads : default_threads();
  parallel(static_cast<int>(std::min<int64_t>({wanted, useful, m})), [&](Team& team) {
    kernel.rows(args, m * team.rank / team.size, m * (team.rank + 1) / team.size);
  });
}

}  // namespace halfbyte::quantize_rows
