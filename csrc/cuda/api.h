// The plain C interface of libhalfbyte_cuda: loads without a driver, knows neither torch nor Python.
//
// Every call puts its kernels on `stream` (a cudaStream_t) of the current device and returns at once; nothing is allocated
// and nothing waits, so calls can be captured in a CUDA graph. 0: done. Otherwise a code that halfbyte_cuda_error explains:
// above 0 a cudaError_t, below 0 one of the library's own (halfbyte_cuda_status), or a cudaError_t negated where the result
// is a number. Pointers are of the device's memory, 16-byte aligned
// where not said otherwise; strides ld* count elements.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HALFBYTE_CUDA_API __attribute__((visibility("default")))

enum halfbyte_cuda_status {
  HALFBYTE_CUDA_BAD_ARGUMENT = -10001,  // a number that no kernel takes
  HALFBYTE_CUDA_ALIGNMENT = -10002,     // a pointer or stride that is not a multiple of what the kernel needs
  HALFBYTE_CUDA_NO_KERNEL = -10003,     // no kernel for this device
  HALFBYTE_CUDA_WORKSPACE = -10004,     // the workspace is smaller than halfbyte_cuda_linear_workspace said
};

enum halfbyte_cuda_dtype { HALFBYTE_F32 = 0, HALFBYTE_BF16 = 1, HALFBYTE_F16 = 2, HALFBYTE_I32 = 3, HALFBYTE_I8 = 4 };

// What follows a product, in the order of the codes of halfbyte's ops.
enum halfbyte_cuda_activation { HALFBYTE_NONE, HALFBYTE_RELU, HALFBYTE_GELU, HALFBYTE_GELU_TANH, HALFBYTE_SILU };

// The format of a weight: layout.h. Patterns of zeros are of 8 bits, without groups and of x of int8.
enum halfbyte_cuda_pattern { HALFBYTE_DENSE = 0, HALFBYTE_TWO_OF_FOUR = 1, HALFBYTE_BLOCKS = 2 };
struct halfbyte_cuda_format {
  int32_t bits, group, scale_bytes, offsets, pattern;
};

// y = activation(x @ weight.T + bias) + residual; with a gate y = (x @ weight.T + bias) * activation(x @ gate.T + gate_bias)
// + residual. m >= 1 rows.
//
// x of float16 or bfloat16: k a multiple of 8, rows 16-byte aligned. x of int8 (HALFBYTE_I8): codes of quantize_rows, k a
// multiple of 16, rows 16-byte aligned, with x_scale [m] and, where not symmetric, x_zero [m] and the totals of the weight:
// int32 where the weight has 8 bits and no groups (sum_k c), else float32 (sum_k of the weight without `scale`).
struct halfbyte_cuda_linear {
  const void* x;
  const float* x_scale;   // int8 x
  const int32_t* x_zero;  // int8 x; may be null: symmetric
  const uint8_t* weight;  // layout.h
  const float* scale;     // [n]
  const void* total;      // [n]; needed with x_zero
  const int32_t* starts;   // blocks: [n / 64, rounded up, + 1]
  const int32_t* columns;  // blocks: [starts[last]]
  const uint8_t* gate;    // null: none
  const float* gate_scale;
  const void* gate_total;
  const float* bias;       // [n] or null
  const float* gate_bias;  // [n] or null
  const void* residual;    // [m, n] or null
  void* y;                 // [m, n]
  void* workspace;         // of halfbyte_cuda_linear_workspace bytes; null where that is 0
  int64_t workspace_bytes;
  int64_t ldx, ldy, ld_residual;
  int32_t m, n, k;
  int32_t x_type, y_type, residual_type;
  int32_t activation;
  struct halfbyte_cuda_format format;
  // 0: chosen. Otherwise forced, for tests and tuning: which kernel (80: copies by threads, partial sums through the
  // workspace; 90: bulk copies, clusters), over how many blocks k is split (1, 2, 4 or 8), warps per block (4 or 8).
  int32_t arch, splits, warps;
  // Not 0: a halfbyte_cuda_rows_run on this stream makes x, and nothing after that writes the weights. Then they are fetched
  // while the work before this call still runs, where that lets the next kernel start, as rows_run does.
  int32_t after_rows;
};

// Rows of floats -> int8 codes, as halfbyte's quantize_rows: float32 operations in the same order, so equal bits.
// One of four inputs to the quantizer: x itself; x + residual normalized (LayerNorm, RMSNorm); or silu(x) * up.
enum halfbyte_cuda_rows_kind { HALFBYTE_ROWS_PLAIN, HALFBYTE_ROWS_LAYERNORM, HALFBYTE_ROWS_RMSNORM, HALFBYTE_ROWS_SILU_MUL };
struct halfbyte_cuda_rows {
  const void* x;         // [m, k] of x_type
  const void* residual;  // norms: [m, k] of x_type, or null; silu_mul: up [m, k] of x_type
  void* sum;             // norms: x + residual [m, k] of x_type, or null
  const float* weight;   // norms: [k] or null
  const float* bias;     // LayerNorm: [k] or null
  int8_t* codes;         // [m, k]; columns k .. k_padded-1 become 0
  float* scale;          // [m]
  int32_t* zero;         // [m]; null where symmetric
  int64_t ldx, ld_residual, ld_sum, ldc;
  int32_t m, k, k_padded;
  int32_t x_type, kind, symmetric;
  float eps;
  float static_scale;  // 0: found per row
  int32_t static_zero;
};

// What follows a product of int8 matrices that something else made, acc int32 [m, n]: the epilogue of an int8 linear op.
struct halfbyte_cuda_finish {
  const int32_t* acc;  // [m, n]
  const float* x_scale;
  const int32_t* x_zero;  // or null
  const float* scale;
  const int32_t* total;
  const float* bias;  // or null
  const void* residual;
  void* y;
  int64_t ld_acc, ldy, ld_residual;
  int32_t m, n, y_type, residual_type, activation;
};

// A packed weight as a row-major matrix [n, k] of float16 or bfloat16: the float32 weight, rounded once.
struct halfbyte_cuda_dequantize {
  const uint8_t* weight;
  const float* scale;
  void* y;
  int64_t ldy;  // k a multiple of 8, rows 16-byte aligned
  int32_t n, k, y_type;
  struct halfbyte_cuda_format format;
};

HALFBYTE_CUDA_API int halfbyte_cuda_abi(void);       // of this interface; changes with it
HALFBYTE_CUDA_API int halfbyte_cuda_devices(void);   // number of devices, or an error code below 0 negated cudaError_t
HALFBYTE_CUDA_API int halfbyte_cuda_arch(int device);  // 80, 90, ... as compute capability 10 * major + minor; or < 0
HALFBYTE_CUDA_API const char* halfbyte_cuda_error(int code);
// Of a call whose arrays may still be missing: the name of its kernel, or null; the bytes of its workspace, or an error below 0.
HALFBYTE_CUDA_API const char* halfbyte_cuda_linear_kernel(const struct halfbyte_cuda_linear* call);
HALFBYTE_CUDA_API int64_t halfbyte_cuda_linear_workspace(const struct halfbyte_cuda_linear* call);
HALFBYTE_CUDA_API int halfbyte_cuda_linear_run(const struct halfbyte_cuda_linear* call, void* stream);
HALFBYTE_CUDA_API int halfbyte_cuda_rows_run(const struct halfbyte_cuda_rows* call, void* stream);
HALFBYTE_CUDA_API int halfbyte_cuda_finish_run(const struct halfbyte_cuda_finish* call, void* stream);
HALFBYTE_CUDA_API int halfbyte_cuda_dequantize_run(const struct halfbyte_cuda_dequantize* call, void* stream);
// layout.h, for packers in other languages and their tests: -1 where the format is none.
HALFBYTE_CUDA_API int64_t halfbyte_cuda_weight_bytes(const struct halfbyte_cuda_format* format, int64_t n, int64_t k);
HALFBYTE_CUDA_API int64_t halfbyte_cuda_code_bit(const struct halfbyte_cuda_format* format, int64_t n, int64_t k, int64_t k_all);
HALFBYTE_CUDA_API int64_t halfbyte_cuda_quad_bit(int64_t n, int64_t k, int64_t k_all, int index, int of_index);  // two_of_four
HALFBYTE_CUDA_API int64_t halfbyte_cuda_scale_byte(const struct halfbyte_cuda_format* format, int64_t n, int64_t k, int64_t k_all,
                                                   int offset);

#ifdef __cplusplus
}
#endif
