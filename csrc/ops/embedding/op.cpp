// embedding: checks, choice of the kernel, rows split over threads.
#include "ops/embedding/op.h"

#include <algorithm>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/parallel.h"

namespace halfbyte::embedding {
namespace {

constexpr const Kernel* kernels[] = {
#define KERNEL(isa) &kernel_##isa,
#include "ops/embedding/kernels.inc"
#undef KERNEL
};

// Below this many elements (some 5 us of work) a second thread costs more than it saves.
constexpr int64_t elements_per_thread = 32 * 1024;

void check_table(const Args& args) {
  check(args.n >= 0 && args.k >= 0, "embedding: negative shape [", args.n, ", ", args.k, "]");
  check(args.bits == 8 || args.bits == 4, "embedding: codes have 8 or 4 bits, not ", args.bits);
  check(!args.nf4 || (args.bits == 4 && !args.zero && !args.minimum),
        "embedding: nf4 codes have 4 bits, no zero and no minimum");
  check(!args.zero || !args.minimum, "embedding: a table has a zero or a minimum, not both");
  // A group is a whole number of vectors, so that only the end of a row is not.
  check(args.group >= 0 && args.group % 32 == 0, "embedding: groups of ", args.group, " are no multiple of 32");
  check(args.group_scale_type == DType::f32 || args.group_scale_type == DType::f16,
        "embedding: group scales must be float32 or float16");
  check(args.n == 0 || args.k == 0 || (args.codes && args.scale), "embedding: codes or scale have no memory");
  const int64_t row_bytes = args.bits == 8 ? args.k : args.k / 2 + args.k % 2;
  check(args.n <= 1 || args.ld >= row_bytes, "embedding: rows overlap: ", args.ld, " bytes for rows of ", row_bytes);
}

void check_ids(const Args& args) {
  for (int64_t r = 0; r < args.m; ++r) {
    if (args.ids[r] >= 0 && args.ids[r] < args.n) continue;
    std::ostringstream message;
    message << "id " << args.ids[r] << " at position " << r << " is outside the table of " << args.n << " rows";
    throw std::out_of_range(message.str());
  }
}

}  // namespace

OpTable table() { return op_table<Kernel>("embedding", kernels); }

void run(const Args& args, int threads) {
  check_table(args);
  check(args.m >= 0, "embedding: negative number of ids ", args.m);
  check(args.out_type != DType::i32, "embedding: the output must be float32, bfloat16 or float16");
  check(args.m == 0 || args.ids, "embedding: the ids have no memory");
  check(args.m == 0 || args.k == 0 || args.out, "embedding: the output has no memory");
  check(args.m <= 1 || args.ldo >= args.k, "embedding: output rows overlap: ", args.ldo, " for ", args.k, " elements");
  check_ids(args);
  if (args.m == 0 || args.k == 0) return;
  const Kernel& kernel = select<Kernel>(kernels, active_isas());
  const int64_t useful = 1 + args.m * args.k / elements_per_thread;
  const int wanted = threads > 0 ? threads : default_threads();
  parallel(static_cast<int>(std::min<int64_t>({wanted, useful, args.m})), [&](Team& team) {
    kernel.rows(args, args.m * team.rank / team.size, args.m * (team.rank + 1) / team.size);
  });
}

}  // namespace halfbyte::embedding
