// linear_w8a16: y = activation(x W^T + bias) + residual with int8 weights and 16-bit activations: weight-only quantization.
// Numbers and bounds as in linear_w4a16, with int8 codes c = -128 .. 127 and zero = 0 where the weight is symmetric.
#pragma once

namespace halfbyte {
struct LinearOp;
}

namespace halfbyte::linear_w8a16 {

extern const LinearOp op;

}  // namespace halfbyte::linear_w8a16
