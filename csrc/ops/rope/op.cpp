// rope: checks, choice of the kernel, rows split over threads.
#include "ops/rope/op.h"

#include <algorithm>
#include <limits>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/parallel.h"

namespace halfbyte::rope {
namespace {

constexpr const Kernel* kernels[] = {
#define KERNEL(isa) &kernel_##isa,
#include "ops/rope/kernels.inc"
#undef KERNEL
};

// Below this many elements (about 5 us of work) a second thread costs more than it saves.
constexpr int64_t elements_per_thread = 32 * 1024;

void check_heads(const char* what, const Heads& heads) {
  check(heads.data, "rope: ", what, " has no memory");
  check(heads.type != DType::i32, "rope: ", what, " must be float32, bfloat16 or float16");
}

bool same_place(const Heads& a, const Heads& b) {
  return a.type == b.type && a.batch_stride == b.batch_stride && a.row_stride == b.row_stride &&
         a.head_stride == b.head_stride;
}

// Strides may come in any order of size: a cache can hold tokens within heads or heads within tokens. One of them must
// hold all that lies below it.
void check_apart(const Args& args, int64_t m) {
  struct Dimension {
    int64_t size, stride;
  };
  Dimension dimensions[] = {{(m + args.tokens - 1) / args.tokens, args.out.batch_stride},
                            {std::min(m, args.tokens), args.out.row_stride},
                            {args.heads, args.out.head_stride}};
  std::sort(std::begin(dimensions), std::end(dimensions), [](const Dimension& a, const Dimension& b) {
    return a.stride < b.stride;
  });
  int64_t extent = args.head_size;
  for (const Dimension& d : dimensions) {
    if (d.size == 1) continue;
    check(d.stride >= extent, "rope: rows or heads of the output overlap: a stride of ", d.stride, " for ", extent,
          " elements");
    extent += (d.size - 1) * d.stride;
  }
}

void check_position(const Args& args, int64_t row, int64_t position) {
  if (position >= 0 && position < args.table) return;
  std::ostringstream message;
  message << "position " << position << " of row " << row << " is outside the table of " << args.table << " positions";
  throw std::out_of_range(message.str());
}

void check_positions(const Args& args, int64_t m) {
  if (args.positions) {
    for (int64_t row = 0; row < m; ++row) check_position(args, row, args.positions[row]);
  } else {
    const int64_t last = std::min(m, args.tokens) - 1;
    check(args.first_position <= std::numeric_limits<int64_t>::max() - last, "rope: first position ",
          args.first_position, " is too large");
    check_position(args, 0, args.first_position);
    check_position(args, last, args.first_position + last);
  }
}

}  // namespace

OpTable table() { return op_table<Kernel>("rope", kernels); }

const Kernel& select() { return halfbyte::select<Kernel>(kernels, active_isas()); }

void run(const Args& args, int64_t m, int threads) {
  check(m >= 0 && args.heads >= 0 && args.head_size >= 0, "rope: negative shape [", m, ", ", args.heads, ", ",
        args.head_size, "]");
  check(args.rotary_dims >= 0 && args.rotary_dims % 2 == 0 && args.rotary_dims <= args.head_size, "rope: rotary_dims ",
        args.rotary_dims, " must be even, not negative and at most the head size ", args.head_size);
  check(args.tokens > 0 || m == 0, "rope: tokens must be positive, got ", args.tokens);
  if (m == 0 || args.heads == 0) return;
  check_heads("x", args.x);
  check_heads("the output", args.out);
  check_apart(args, m);
  check(args.x.data != args.out.data || same_place(args.x, args.out),
        "rope: the output lies where x does, but with another type or other strides");
  if (args.rotary_dims > 0) {
    check(args.cos && args.sin, "rope: the table has no memory");
    check_positions(args, m);
  }
  const Kernel& kernel = select();
  const int64_t useful = 1 + m * args.heads * args.head_size / elements_per_thread;
  const int wanted = threads > 0 ? threads : default_threads();
  parallel(static_cast<int>(std::min<int64_t>({wanted, useful, m})), [&](Team& team) {
    kernel.rows(args, m * team.rank / team.size, m * (team.rank + 1) / team.size);
  });
}

}  // namespace halfbyte::rope
