"""Floats to codes: `quantize` for the weights of a layer, `quantize_rows` as the ops do with activations."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from . import _core, search
from .arrays import Array, Gpu, float_code, kind_of, on_gpu, place_of
from .dispatch import isa_errors
from .errors import NonFiniteError, ShapeError
from .quantized_tensor import NF4_CODES as NF4_CODES
from .quantized_tensor import PARTS, QuantizedTensor, to_nibbles
from .scheme import Scheme
from .sparse.scheme import SparseScheme

# The last multiple of 64, to which k is padded, below (2^31 - 1) / (255 * 128) = 65793.06: more products of
# two codes could overflow the int32 accumulator.
K_MAX = 65792
TINY = 2.0**-100  # a scale below this counts as zero: its inverse would leave float32


class RowQuantized(NamedTuple):
    """Rows x [m, k] as codes: `x ~ (codes - zero[:, None]) * scale[:, None]`."""

    codes: Array  # int8 [m, k]
    scale: Array  # float32 [m]
    zero: Array  # int32 [m]
    sums: Array  # int32 [m], the sum of each row's codes


def quantize(
    weight: Array, scheme: str | Scheme = "w8a8", *, method: str | None = None, name: str = "weight"
) -> QuantizedTensor:
    """Quantize a weight matrix to the codes and scales that `scheme` says; rounding is half to even.

    weight: [n, k], float32, float16 or (torch) bfloat16, any strides. `name` is what errors call the weight.
    One on a GPU is copied to the CPU, where all numbers are found; the result is where the weight is.

    method: "absmax" spans the range of each group or channel: with symmetric int8 per channel
    `scale = max|w| / 127`, the error of each element is at most scale/2 * (1 + 2^-15), and zero stays zero.
    "mse" searches the scales (and zero points) of the least squared error. "weighted" weights each error by
    the likely importance of its input feature, guessed from the weights; asymmetric schemes with groups get
    float minimums. "hqq" searches float minimums of the least l_p error, for schemes with groups and +asym.
    None: "absmax" for 8 bits, "weighted" for 4 bits.

    Raises SchemeError (also for a method that is unknown or does not fit the scheme), DTypeError (TypeError),
    DeviceError, ShapeError and NonFiniteError (ValueError).
    """
    scheme = Scheme.parse(scheme)
    if method is None:
        method = search.DEFAULT_INT4 if scheme.weight_bits == 4 else "absmax"
    if min(_matrix_shape(weight, name, limited=not scheme.fold_group)) == 0:
        raise ShapeError(f"{name} has the shape {tuple(weight.shape)}: there is nothing in it to quantize")
    if on_gpu(weight):
        return _quantize_from_gpu(weight, scheme, method, name)
    if method == "absmax" and (scheme.weight_bits, scheme.group, scheme.asym) == (8, 0, False):
        rows = _quantize_rows(weight, name, symmetric=True)
        finite = np.isfinite(np.asarray(rows.scale))
        if not finite.all():
            raise non_finite(name, int(finite.argmin()))
        return QuantizedTensor(rows.codes, rows.scale, scheme)
    kind = kind_of(weight, name)
    float_code(kind, weight.dtype, name)
    floats = kind.to_numpy(weight)
    finite = np.isfinite(floats.min(1)) & np.isfinite(floats.max(1))
    if not finite.all():
        raise non_finite(name, int(finite.argmin()))
    found = search.encode(floats, scheme, method)
    codes = found.pop("codes_unpacked")
    found["codes"] = to_nibbles(codes) if scheme.weight_bits == 4 else codes
    parts = {what: None if part is None else kind.from_numpy(part) for what, part in found.items()}
    return QuantizedTensor(**parts, scheme=scheme, k=weight.shape[1])


def _quantize_from_gpu(weight: Array, scheme: Scheme, method: str, name: str) -> QuantizedTensor:
    kind = place_of(weight, name)
    float_code(kind, weight.dtype, name)
    q = quantize(kind.to_numpy(weight), scheme, method=method, name=name)
    parts = {what: None if (p := getattr(q, what)) is None else kind.from_numpy(p) for what in PARTS}
    return QuantizedTensor(**parts, scheme=scheme, k=q.k)


def dequantize(q: QuantizedTensor) -> Array:
    """The float32 [n, k] weight that `q` stands for, of the same kind (numpy or torch)."""
    return q.dequantize()


def quantize_rows(
    x: Array, *, scale: float | None = None, zero: int | None = None, symmetric: bool = False
) -> RowQuantized:
    """Quantize each row of x [m, k] to int8, as `linear` does with its activations.

    Asymmetric per row by default (`scale = (max(x, 0) - min(x, 0)) / 255`); `symmetric=True` is the formula
    of the weights (`scale = max|x| / 127`, zero 0); `scale` and `zero` given fix both for all rows. A row
    that holds a NaN or an infinity gets scale NaN and codes 0.

    x: float32, float16 or (torch) bfloat16, any strides. Raises DTypeError, DeviceError, ShapeError,
    ValueError.
    """
    if (scale is None) != (zero is None):
        raise ValueError("quantize_rows: give scale and zero together, or neither")
    if scale is not None and symmetric:
        raise ValueError("quantize_rows: a given scale and zero leave nothing for symmetric=True to decide")
    return _quantize_rows(x, "x", symmetric=symmetric, static=None if scale is None else (scale, zero))


def check_takes_static(scheme: Scheme | SparseScheme) -> None:
    """ValueError for a scheme whose activations have no scale and zero point per token to be fixed."""
    if not scheme.per_token:
        have = "scales per group of features" if isinstance(scheme, Scheme) else "none, as they stay floats"
        raise ValueError(
            f"a static scale and zero point replace those of a token; with {scheme} activations have {have}: "
            "give none"
        )


def check_static(static: tuple[float, int]) -> tuple[float, int]:
    """(scale, zero) of a static quantization as Python numbers, or ValueError."""
    try:
        scale, zero = static
        scale, exact = float(np.float32(float(scale))), float(zero)
    except (TypeError, ValueError):
        raise ValueError(f"static must be a pair of numbers (scale, zero), not {static!r}") from None
    if not (math.isfinite(scale) and scale >= TINY):
        raise ValueError(f"the static scale is {static[0]}; it must be a finite float32 of at least 2^-100")
    if exact not in range(-128, 128):
        raise ValueError(f"the static zero point is {zero}; it must be an integer from -128 to 127")
    return scale, int(exact)


def non_finite(name: str, row: int) -> NonFiniteError:
    return NonFiniteError(
        f"{name} holds a NaN or an infinity, first in row {row}; repair the weight, or exclude the "
        "layer from quantization"
    )


def _matrix_shape(x: Array, what: str, *, limited: bool = True) -> tuple[int, int]:
    place_of(x, what)
    if x.ndim != 2:
        raise ShapeError(f"{what} has the shape {tuple(x.shape)}; it must be a matrix [rows, k]")
    if limited and x.shape[1] > K_MAX:
        raise ShapeError(
            f"{what} has rows of {x.shape[1]} elements; the int32 accumulator is exact up to {K_MAX}"
        )
    return tuple(x.shape)


def _quantize_rows(
    x: Array, what: str, *, symmetric: bool, static: tuple[float, int] | None = None
) -> RowQuantized:
    kind = place_of(x, what)
    code = float_code(kind, x.dtype, what)
    m, k = _matrix_shape(x, what)
    if k == 0:
        raise ShapeError(f"{what} has rows of no elements; k must be at least 1")
    static_scale, static_zero = check_static(static) if static else (0.0, 0)
    if isinstance(kind, Gpu):
        from .cuda.rows import quantize_rows as on_this_gpu

        return on_this_gpu(x, symmetric, (static_scale, static_zero))
    rows, ld = kind.rows(x, k)
    out = RowQuantized(
        kind.empty((m, k), kind.int8),
        kind.empty((m,), kind.float32),
        kind.empty((m,), kind.int32),
        kind.empty((m,), kind.int32),
    )
    with isa_errors:
        _core.quantize_rows(
            m,
            k,
            kind.pointer(rows),
            ld,
            code,
            kind.pointer(out.codes),
            k,
            kind.pointer(out.scale),
            kind.pointer(out.zero),
            kind.pointer(out.sums),
            symmetric,
            static_scale,
            static_zero,
            0,  # one scale per row
            False,  # of int8 codes
            kind.threads(),
        )
    return out
