"""What stands between the linear layers: LayerNorm and RMSNorm, alone or quantized, and rotary embeddings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import _core
from .arrays import F32, Array, Gpu, Kind, check_kind, check_vector, float_code, kind_of, place_of
from .dispatch import isa_errors
from .errors import DTypeError, ShapeError
from .quantize import K_MAX, RowQuantized, check_static, quantize_rows


def layernorm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    residual: Array | None = None,
    return_sum: bool = False,
    out_dtype: Any = None,
) -> Array | tuple[Array, Array]:
    """`(h - mean(h)) / sqrt(var(h) + eps) * weight + bias` of each row h of `x + residual`.

    x: [..., k], the last dimension is normalized; float32, float16 or (torch) bfloat16. weight, bias: [k].
    residual: of the shape of x. All of the kind of x: numpy or torch. out_dtype: that of x unless given.
    Everything between is float32. return_sum: also return h, of the shape and dtype of x.

    Returns y, or (y, h), contiguous. A NaN or an infinity makes its row NaN. Not differentiable. Raises
    DTypeError (TypeError), ShapeError, DeviceError or ValueError.
    """
    return _normalized("layernorm", x, weight, bias, eps, residual, return_sum, out_dtype)


def rmsnorm(
    x: Array,
    weight: Array | None = None,
    *,
    eps: float = 1e-6,
    residual: Array | None = None,
    return_sum: bool = False,
    out_dtype: Any = None,
) -> Array | tuple[Array, Array]:
    """`h / sqrt(mean(h^2) + eps) * weight` of each row h of `x + residual`; the rest as in `layernorm`."""
    return _normalized("rmsnorm", x, weight, None, eps, residual, return_sum, out_dtype)


def layernorm_quantize(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    residual: Array | None = None,
    return_sum: bool = False,
    scale: float | None = None,
    zero: int | None = None,
    symmetric: bool = False,
) -> RowQuantized | tuple[RowQuantized, Array]:
    """`quantize_rows(layernorm(...))` in one pass over memory: the codes are of the float32 row, which is not
    rounded to the dtype of x in between.

    scale, zero and symmetric as in `quantize_rows`, the rest as in `layernorm`. x is [..., k], and so are the
    codes; scale, zero and sums are [...].
    """
    grid = (scale, zero, symmetric)
    return _quantized("layernorm_quantize", x, weight, bias, eps, residual, return_sum, grid)


def rmsnorm_quantize(
    x: Array,
    weight: Array | None = None,
    *,
    eps: float = 1e-6,
    residual: Array | None = None,
    return_sum: bool = False,
    scale: float | None = None,
    zero: int | None = None,
    symmetric: bool = False,
) -> RowQuantized | tuple[RowQuantized, Array]:
    """`quantize_rows(rmsnorm(...))` in one pass over memory; see `layernorm_quantize`."""
    grid = (scale, zero, symmetric)
    return _quantized("rmsnorm_quantize", x, weight, None, eps, residual, return_sum, grid)


def silu_mul_quantize(
    gate: Array,
    up: Array,
    *,
    scale: float | None = None,
    zero: int | None = None,
    symmetric: bool = False,
) -> RowQuantized:
    """`quantize_rows(silu(gate) * up)`, what lies between the layers of a gated MLP; on a GPU in one pass
    over memory. The codes are of float32 rows, which are not rounded in between.

    gate, up: [..., k] of one shape; float32, float16 or (torch) bfloat16, numpy or torch. scale, zero and
    symmetric as in `quantize_rows`; the codes are [..., k], scale, zero and sums [...]. Not differentiable.
    Raises DTypeError (TypeError), ShapeError, DeviceError or ValueError.
    """
    name, kind = "silu_mul_quantize", place_of(gate, "gate")
    float_code(kind, gate.dtype, "gate")
    _check_like(kind, up, gate, "up", "gate")
    _not_recorded(name, kind, gate, up)
    static, shape = _grid(name, scale, zero, symmetric), tuple(gate.shape)
    if not shape or not 0 < shape[-1] <= K_MAX:
        raise ShapeError(f"gate has the shape {shape}; codes are for rows of 1 to {K_MAX} elements")
    if isinstance(kind, Gpu):
        from .cuda.rows import silu_mul_quantize as on_this_gpu

        return on_this_gpu(gate, up, symmetric, static)
    rows = [kind.cast(a, kind.float32).reshape(math.prod(shape[:-1]), shape[-1]) for a in (gate, up)]
    q = quantize_rows(kind.silu(rows[0]) * rows[1], scale=scale, zero=zero, symmetric=symmetric)
    return RowQuantized(q.codes.reshape(shape), *(part.reshape(shape[:-1]) for part in q[1:]))


def _normalized(name, x, weight, bias, eps, residual, return_sum, out_dtype):
    kind = kind_of(x, "x")
    float_code(kind, x.dtype, "x")
    out_dtype = x.dtype if out_dtype is None else kind.dtype(out_dtype)
    out_code = float_code(kind, out_dtype, "the output")
    out = kind.empty(tuple(x.shape), out_dtype)
    target = (kind.pointer(out), x.shape[-1] if x.ndim else 0, out_code)
    total = _run(name, kind, x, weight, bias, eps, residual, return_sum, target, _NO_CODES)
    return (out, total) if return_sum else out


def _grid(name: str, scale: float | None, zero: int | None, symmetric: bool) -> tuple[float, int]:
    """The static scale and zero; a scale of 0 is found per row."""
    if (scale is None) != (zero is None):
        raise ValueError(f"{name}: give scale and zero together, or neither")
    if scale is not None and symmetric:
        raise ValueError(f"{name}: a given scale and zero leave nothing for symmetric=True to decide")
    return (0.0, 0) if scale is None else check_static((scale, zero))


def _quantized(name, x, weight, bias, eps, residual, return_sum, grid):
    kind = place_of(x, "x")
    static, symmetric = _grid(name, *grid), grid[2]
    shape = tuple(x.shape)
    if shape and not 0 < shape[-1] <= K_MAX:
        raise ShapeError(f"x has rows of {shape[-1]} elements; codes are for 1 to {K_MAX} of them")
    if isinstance(kind, Gpu):
        from .cuda.rows import normalize_quantize

        weight, bias, _ = _operands(name, kind, x, weight, bias, residual)
        if not (math.isfinite(eps) and eps >= 0):
            raise ValueError(f"{name}: eps must be finite and not negative, got {eps}")
        rms = name.startswith("rms")
        out, total = normalize_quantize(x, rms, weight, bias, eps, residual, return_sum, symmetric, static)
        return (out, total) if return_sum else out
    rows = shape[:-1]
    out = RowQuantized(
        kind.empty(shape, kind.int8),
        kind.empty(rows, kind.float32),
        kind.empty(rows, kind.int32),
        kind.empty(rows, kind.int32),
    )
    codes, *parts = (kind.pointer(part) for part in out)
    arguments = (codes, shape[-1] if shape else 0, *parts, symmetric, *static, 0, False)
    total = _run(name, kind, x, weight, bias, eps, residual, return_sum, (0, 0, F32), arguments)
    return (out, total) if return_sum else out


# codes, stride, scale, zero, sums, symmetric, static scale and zero, group, 16 bits
_NO_CODES = (0, 0, 0, 0, 0, False, 0.0, 0, 0, False)


def _run(
    name: str,
    kind: Kind,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    residual: Array | None,
    return_sum: bool,
    out: tuple[int, int, int],
    codes: tuple,
) -> Array | None:
    """The checks that all of them share, and the kernel; returns the sum, where it is wanted."""
    code, k = float_code(kind, x.dtype, "x"), x.shape[-1] if x.ndim else 0
    *vectors, residual_code = _operands(name, kind, x, weight, bias, residual)
    residual_rows, residual_arguments = None, (0, 0, F32)
    if residual is not None:
        residual_rows, ld = kind.rows(residual, k)
        residual_arguments = (kind.pointer(residual_rows), ld, residual_code)
    rows, ld = kind.rows(x, k)
    total = kind.empty(tuple(x.shape), x.dtype) if return_sum else None
    with isa_errors:
        _core.norm(
            name.startswith("rms"),
            len(rows),
            k,
            kind.pointer(rows),
            ld,
            code,
            *residual_arguments,
            *(0 if vector is None else kind.pointer(vector) for vector in vectors),
            eps,
            0 if total is None else kind.pointer(total),
            k,
            code,
            *out,
            *codes,
            kind.threads(),
        )
    return total


def _operands(
    name: str, kind: Kind, x: Array, weight: Array | None, bias: Array | None, residual: Array | None
) -> tuple[Array | None, Array | None, int]:
    """Checked: (weight and bias as float32, the dtype code of the residual)."""
    float_code(kind, x.dtype, "x")
    _not_recorded(name, kind, x, residual)
    if x.ndim == 0:
        raise ShapeError(f"{name}: x is a single number; it must have a last dimension to normalize")
    vectors = []
    for what, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_vector(kind, vector, x.shape[-1], what, "x")
            vector = kind.cast(vector, kind.float32)
        vectors.append(vector)
    return *vectors, F32 if residual is None else _check_like(kind, residual, x, "residual", "x")


def _check_like(kind: Kind, array: Array, x: Array, what: str, like: str) -> int:
    """Errors for an operand that is not of the kind and shape of x; its dtype code."""
    check_kind(kind, array, what, like)
    code = float_code(kind, array.dtype, what)
    if tuple(array.shape) != tuple(x.shape):
        raise ShapeError(f"{what} has the shape {tuple(array.shape)}; {like} has {tuple(x.shape)}")
    return code


def rope(
    x: Array,
    positions: Array,
    *,
    theta: float = 10000.0,
    rotary_dims: int | None = None,
    interleaved: bool = False,
    cos_sin: tuple[Array, Array] | None = None,
) -> Array:
    """Rotary position embedding of the first `rotary_dims` elements (all, unless given) of each head of x.

    x: [..., tokens, heads, head_size], float32, float16 or (torch) bfloat16. positions: [tokens] or
    [..., tokens], integers. All of the kind of x: numpy or torch. Pair i turns by the angle
    `position * theta ** (-2 * i / rotary_dims)`, computed in float64; it is (i, i + rotary_dims / 2), the
    "rotate half" of transformers, or (2 i, 2 i + 1) where interleaved. cos_sin: instead of theta, a model's
    own tables [length, rotary_dims / 2] of cosines and sines; a position outside them is an IndexError.

    Returns an array like x, contiguous. Not differentiable. Raises DTypeError (TypeError), ShapeError,
    DeviceError, ValueError or IndexError.
    """
    kind = kind_of(x, "x")
    code = float_code(kind, x.dtype, "x")
    _not_recorded("rope", kind, x)
    if x.ndim < 3:
        raise ShapeError(f"x has the shape {tuple(x.shape)}; it must be [..., tokens, heads, head_size]")
    *leading, heads, head_size = x.shape
    places = _positions(kind, positions, tuple(leading))
    if cos_sin is None:
        rotary_dims = _rotary_dims(head_size if rotary_dims is None else rotary_dims, head_size)
        tables = _tables(places, theta, rotary_dims)
        pointers, length = [table.__array_interface__["data"][0] for table in tables], len(tables[0])
        tokens, places = places.size, None  # row r of the table is for row r of the positions
    else:
        tables = _given_tables(kind, cos_sin, rotary_dims)
        length, half = tables[0].shape
        rotary_dims = _rotary_dims(2 * half, head_size)
        pointers = [kind.pointer(table) for table in tables]
        tokens = leading[-1]
        places = np.ascontiguousarray(np.broadcast_to(places, leading))
    k = heads * head_size
    rows, ld = kind.rows(x.reshape(*leading, k), k)
    out = kind.empty(tuple(x.shape), x.dtype)
    with isa_errors:
        _core.rope(
            len(rows),
            tokens,
            heads,
            head_size,
            kind.pointer(rows),
            code,
            (tokens * ld, ld, head_size),
            kind.pointer(out),
            code,
            (tokens * k, k, head_size),
            rotary_dims,
            interleaved,
            *pointers,
            length,
            0 if places is None else places.__array_interface__["data"][0],
            0,
            kind.threads(),
        )
    return out


def _not_recorded(name: str, kind: Kind, *tensors: Array | None) -> None:
    if any(getattr(x, "requires_grad", False) for x in tensors) and kind.torch.is_grad_enabled():
        raise ValueError(
            f"{name}: x requires a gradient, which this function does not record; call it under "
            "torch.no_grad()"
        )


def _positions(kind: Kind, positions: Array, leading: tuple[int, ...]) -> np.ndarray:
    """int64, of the shape that was given."""
    check_kind(kind, positions, "positions", "x")
    if "int" not in str(positions.dtype):
        raise DTypeError(f"positions have the dtype {positions.dtype}; they must be integers")
    if tuple(positions.shape) not in (leading, leading[-1:]):
        raise ShapeError(
            f"positions have the shape {tuple(positions.shape)}; x has the tokens {leading}: give one for "
            "each of them, or for each of the last dimension"
        )
    return np.ascontiguousarray(positions, np.int64)


def _rotary_dims(rotary_dims: int, head_size: int) -> int:
    if not (0 < rotary_dims <= head_size and rotary_dims % 2 == 0):
        raise ShapeError(
            f"rotary_dims is {rotary_dims}; it must be even, positive and at most the head size {head_size}"
        )
    return rotary_dims


def _tables(positions: np.ndarray, theta: float, rotary_dims: int) -> list[np.ndarray]:
    """cos and sin float32 [positions, rotary_dims / 2]."""
    if not (math.isfinite(theta) and theta > 0):
        raise ValueError(f"theta is {theta}; it must be finite and positive")
    turns = float(theta) ** (-np.arange(0, rotary_dims, 2) / rotary_dims)
    angles = positions.reshape(-1, 1) * turns
    return [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]


def _given_tables(kind: Kind, cos_sin: tuple[Array, Array], rotary_dims: int | None) -> list[Array]:
    cos, sin = cos_sin
    for what, table in (("cos", cos), ("sin", sin)):
        check_kind(kind, table, what, "x")
        float_code(kind, table.dtype, what)
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise ShapeError(
            f"cos and sin have the shapes {tuple(cos.shape)} and {tuple(sin.shape)}; both must be "
            "[length, rotary_dims / 2]"
        )
    if rotary_dims is not None and rotary_dims != 2 * cos.shape[1]:
        raise ShapeError(f"rotary_dims is {rotary_dims}, but the tables are for {2 * cos.shape[1]}")
    return [kind.cast(table, kind.float32) for table in (cos, sin)]
