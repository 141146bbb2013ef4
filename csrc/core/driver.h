// Linear ops from float rows to float rows.
#pragma once
#include "core/multiply.h"
#include "ops/norm/op.h"

namespace halfbyte {

// m rows times weights that take the same codes. a: x, ldx, x_type and the static scale are the caller's; through: the norm
// that the rows go through first, or null. 0 threads: default.
void gemm(std::span<const Product> products, quantize_rows::Args a, const norm::Parameters* through, int64_t m, int threads);

}  // namespace halfbyte
