// The only chooser: the first row of an op's kernels.inc whose instruction set is active wins.
#pragma once
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cpu_features.h"
#include "core/kernel.h"

namespace halfbyte {

// Every op's Kernel struct starts with a KernelInfo called `info`. The last row is always `scalar`, so one matches.
template <class Kernel>
const Kernel& select(std::span<const Kernel* const> best_first, uint32_t available) {
  for (const Kernel* kernel : best_first) {
    if (kernel->info.needs & available) return *kernel;
  }
  throw std::logic_error("a kernel list without a scalar row");
}

struct LinearOp;

struct OpTable {
  const char* op;
  std::vector<const KernelInfo*> best_first;
  const LinearOp* linear;  // null: no linear op
};

template <class Kernel>
OpTable op_table(const char* op, std::span<const Kernel* const> best_first, const LinearOp* linear = nullptr) {
  OpTable table{op, {}, linear};
  for (const Kernel* kernel : best_first) table.best_first.push_back(&kernel->info);
  return table;
}

std::vector<OpTable> op_tables();  // all ops, for introspection
std::string selected_name(const std::string& op, uint32_t available);

}  // namespace halfbyte
