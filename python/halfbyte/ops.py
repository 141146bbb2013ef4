"""The ops on numpy arrays and torch tensors: arguments checked here, then one call into the C++ core."""

from __future__ import annotations

from typing import Any

from . import _core
from .arrays import Array, Kind, check_kind, check_vector, float_code, kind_of
from .dispatch import isa_errors
from .errors import DTypeError, ShapeError
from .pack import PackedWeight
from .quantize import check_static, check_takes_static
from .scheme import Scheme

_W8A8 = Scheme(8, 8)
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


def linear(
    x: Array,
    packed: PackedWeight,
    bias: Array | None = None,
    *,
    activation: str = "none",
    residual: Array | None = None,
    out_dtype: Any = None,
    static: tuple[float, int] | None = None,
) -> Array:
    """`activation(x @ weight.T + bias) + residual` with integer products, exact int32 sums and a fused
    epilogue; the scheme of the weight says how x is quantized.

    x: [..., k] with any leading dimensions, also none or empty; float32, float16 or (torch) bfloat16. bias:
    [n], floating point. residual: [..., n], floating point. All of the kind of x: numpy or torch. activation:
    none, relu, gelu (erf), gelu_tanh or silu. out_dtype: that of x unless given; int32 returns the
    accumulator itself, `sum_k (qx - zero) * qw`, which only w8a8 has, and takes no bias, activation or
    residual. static: (scale, zero) for all of x instead of a scale and zero point per row found from the row,
    for schemes with a8 and without +ag.

    Returns [..., n], contiguous. A row of x with a NaN or an infinity gives a row of NaN. Not differentiable:
    QLinear is. Raises DTypeError (TypeError), ShapeError, DeviceError or ValueError.
    """
    kind = kind_of(x, "x")
    if getattr(x, "requires_grad", False) and kind.torch.is_grad_enabled():
        raise ValueError(
            "linear: x requires a gradient, which this function does not record; use a QLinear, or call "
            "it under torch.no_grad()"
        )
    return run_linear(x, packed, bias, activation, residual, out_dtype, static)


def run_linear(
    x: Array,
    packed: PackedWeight,
    bias: Array | None,
    activation: str,
    residual: Array | None,
    out_dtype: Any,
    static: tuple[float, int] | None,
) -> Array:
    """`linear` below autograd: every argument check, then the kernel."""
    kind = kind_of(x, "x")
    x_code = float_code(kind, x.dtype, "x")
    if not isinstance(packed, PackedWeight):
        raise DTypeError(f"linear takes the PackedWeight that pack() returns, not {type(packed).__name__}")
    n, k = packed.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ShapeError(
            f"x has the shape {tuple(x.shape)}; its last dimension must be the {k} input features of the "
            "weight"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of: {', '.join(ACTIVATIONS)}")
    out_dtype = x.dtype if out_dtype is None else kind.dtype(out_dtype)
    if out_dtype == kind.int32:
        if bias is not None or residual is not None or activation != "none":
            raise ValueError(
                "an int32 output is the bare accumulator: it takes no bias, activation or residual"
            )
        if packed.scheme != _W8A8:
            raise ValueError(
                f"an int32 output is the one integer sum that an output of {_W8A8} has; {packed.scheme} adds "
                "floats: ask for a floating-point dtype"
            )
        out_code = kind.codes[out_dtype]
    else:
        out_code = float_code(kind, out_dtype, "the output")
    scale, zero = 0.0, 0
    if static is not None:
        check_takes_static(packed.scheme)
        scale, zero = check_static(static)
    if bias is not None:
        check_vector(kind, bias, n, "bias", "x")
        bias = kind.cast(bias, kind.float32)

    out = kind.empty((*x.shape[:-1], n), out_dtype)
    rows, ld = kind.rows(x, k)
    residual_args = (0, 0, 0)
    if residual is not None:
        residual, *residual_args = _residual(kind, residual, tuple(out.shape))
    with isa_errors:
        _core.linear(
            packed.core,
            len(rows),
            kind.pointer(rows),
            ld,
            x_code,
            kind.pointer(out),
            n,
            out_code,
            0 if bias is None else kind.pointer(bias),
            ACTIVATIONS[activation],
            *residual_args,
            scale,
            zero,
            kind.threads(),
        )
    return out


def _residual(kind: Kind, residual: Array, shape: tuple[int, ...]) -> tuple[Array, int, int, int]:
    check_kind(kind, residual, "residual", "x")
    code = float_code(kind, residual.dtype, "residual")
    if tuple(residual.shape) != shape:
        raise ShapeError(f"residual has the shape {tuple(residual.shape)}; the output has {shape}")
    rows, ld = kind.rows(residual, shape[-1])
    return rows, kind.pointer(rows), ld, code
