// attention: checks, choice of the kernel, tasks shared by threads.
#include "ops/attention/op.h"

#include <algorithm>
#include <memory>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/share.h"
#include "core/workspace.h"

namespace halfbyte::attention {
namespace {

constexpr const Kernel* kernels[] = {
#define KERNEL(isa) &kernel_##isa,
#include "ops/attention/kernels.inc"
#undef KERNEL
};

// Below this many multiplications (2 to 10 us of work) a second thread costs more than it saves.
constexpr int64_t products_per_thread = 256 * 1024;

// Positions stay far from the end of int64.
constexpr int64_t furthest = int64_t{1} << 40;

thread_local Workspace workspace;  // the scratch of all threads of a call

void check_shape(const Args& args) {
  check(args.batch >= 0 && args.queries >= 0 && args.keys >= 0, "attention: negative shape: batch ", args.batch, ", ",
        args.queries, " queries, ", args.keys, " keys");
  check(args.heads >= 1 && args.kv_heads >= 1 && args.heads % args.kv_heads == 0, "attention: ", args.heads,
        " heads are no multiple of ", args.kv_heads, " key and value heads");
  check(args.head_size >= 1, "attention: heads of ", args.head_size, " elements");
  check(std::max({args.batch, args.queries, args.keys}) <= furthest, "attention: too many positions");
  check(args.offset >= -furthest && args.offset <= furthest, "attention: offset ", args.offset, " is out of range");
  check(args.window >= 0 && args.window <= furthest, "attention: a window of ", args.window, " keys");
}

// A dimension of the output may repeat nothing: its stride leaves room for what lies inside it.
void check_rows(int64_t size, int64_t stride, int head_size, const char* what) {
  check(size <= 1 || stride >= head_size || stride <= -head_size, "attention: output ", what, " overlap: stride ",
        stride, " for ", head_size, " elements");
}

}  // namespace

OpTable table() { return op_table<Kernel>("attention", kernels); }

const Kernel& select() { return halfbyte::select<Kernel>(kernels, active_isas()); }

void check_args(const Args& args) {
  check_shape(args);
  check(args.q_type != DType::i32 && args.out_type != DType::i32,
        "attention: queries and output must be float32, bfloat16 or float16");
  const bool int8 = args.kv_type == Storage::int8;
  check(int8 || (!args.k_scale && !args.v_scale), "attention: only int8 keys and values have scales");
  check((args.mask_kind == Mask::none) == (args.mask == nullptr), "attention: a mask needs a kind and memory");
  if (args.batch == 0 || args.queries == 0) return;
  check(args.q && args.out, "attention: queries or output have no memory");
  check_rows(args.batch, args.out_batch, args.head_size, "sequences");
  check_rows(args.queries, args.out_row, args.head_size, "rows");
  check_rows(args.heads, args.out_head, args.head_size, "heads");
  if (args.keys == 0) return;
  check(args.k && args.v, "attention: keys or values have no memory");
  check(!int8 || (args.k_scale && args.v_scale), "attention: int8 keys and values need their scales");
}

int64_t tasks(const Args& args) {
  const int64_t rows = args.queries * (args.heads / args.kv_heads);
  return args.batch * args.kv_heads * ceil_div(rows, task_rows);
}

// What Memory in tile.h takes: queries and outputs of the rows, a block of keys and of values as float32; scores and
// masks of a block; 16 rows of a mask, one more, and 6 numbers per row.
int64_t scratch_bytes(const Args& args) {
  const int64_t head = round_up(args.head_size, 16);
  const int64_t blocks = head * (2 * task_rows + 2 * key_block) + 2 * key_block * task_rows;
  const int64_t floats = blocks + 17 * key_block + 6 * task_rows;
  return floats * static_cast<int64_t>(sizeof(float));
}

void run(const Args& args, int threads) {
  check_args(args);
  const int64_t total = tasks(args);
  if (total == 0) return;
  const Kernel& kernel = select();
  const int64_t per_row = args.queries * std::max<int64_t>(args.keys, 1) * args.head_size;
  const int64_t useful = 1 + args.batch * args.heads * per_row / products_per_thread;
  const int wanted = static_cast<int>(std::min<int64_t>({threads > 0 ? threads : default_threads(), useful, total}));
  const int64_t bytes = scratch_bytes(args);
  uint8_t* const scratch = workspace.reserve(bytes * wanted);
  Share few[8];
  std::unique_ptr<Share[]> many(wanted > 8 ? new Share[wanted] : nullptr);
  parallel(wanted, [&](Team& team) {
    Shares shares(many ? many.get() : few);
    shares.run(team, total, [&](int64_t task) { kernel.task(args, task, scratch + bytes * team.rank); });
  });
}

}  // namespace halfbyte::attention
