// linear_w8a16 on AMX.
#include "tiles/amx_int8.h"

#include "ops/linear_w8a16/kernel.h"

namespace halfbyte::linear_w8a16 {

constinit const GemmKernel kernel_amx_int8 = {
    .info = {"linear_w8a16_32x32x64_amx_int8", "amx_int8", isa_amx_int8},
    .wide = false,
    .grain = 1 << 20,
    .grouped = {amx_int8::mr, amx_int8::mr, 1, 1, amx_int8::bytes_a16},
    .epilogue = amx_int8::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::linear_w8a16
