// Collects the kernel lists of all ops. ops.inc is written by CMake: one OP(folder) line per folder of csrc/ops.
#include "core/dispatch.h"

#include "core/check.h"

namespace halfbyte {

#define OP(name) \
  namespace name { \
  OpTable table(); \
  }
#include "ops.inc"
#undef OP

std::vector<OpTable> op_tables() {
  return {
#define OP(name) name::table(),
#include "ops.inc"
#undef OP
  };
}

std::string selected_name(const std::string& op, uint32_t available) {
  std::string known;
  for (const OpTable& table : op_tables()) {
    known += std::string(known.empty() ? "" : ", ") + table.op;
    if (op != table.op) continue;
    for (const KernelInfo* kernel : table.best_first) {
      if (kernel->needs & available) return kernel->name;
    }
  }
  fail("no op '", op, "': the ops are ", known);
}

}  // namespace halfbyte
