// linear_w8a8 on AMX.
#include "tiles/amx_int8.h"

#include "ops/linear_w8a8/kernel.h"

namespace halfbyte::linear_w8a8 {

constinit const GemmKernel kernel_amx_int8 = {
    .info = {"linear_w8a8_32x32x64_amx_int8", "amx_int8", isa_amx_int8},
    .wide = false,
    .grain = 1 << 20,
    .grouped = {amx_int8::mr, amx_int8::mr, 1, 1, amx_int8::bytes_a8},
    .epilogue = amx_int8::epilogue,
    .plain = {amx_int8::mr, amx_int8::mr, 1, 1, amx_int8::byte_sums},
};

}  // namespace halfbyte::linear_w8a8
