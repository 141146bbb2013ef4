// Linear ops from float rows to float rows.
#pragma once
#include "core/multiply.h"

namespace halfbyte {

// m rows times weights that take the same codes. a: x, ldx, x_type and the static scale are the caller's.
void gemm(std::span<const Product> products, quantize_rows::Args a, int64_t m, int threads);  // 0 threads: default

}  // namespace halfbyte
