"""Scaled dot product attention on numpy arrays and torch tensors, and int8 codes for its keys and values."""

from __future__ import annotations

import math
from typing import NamedTuple

from . import _core
from .arrays import NUMPY, Array, Kind, check_kind, float_code, kind_of
from .dispatch import isa_errors
from .errors import DTypeError, ShapeError
from .quantize import quantize_rows

_INT8 = 3  # code of the storage of keys and values; the floats have those of dtypes
_ADD, _BOOLEAN = 1, 2  # codes of masks


class QuantizedKV(NamedTuple):
    """Keys or values as codes: `x ~ codes * scale[..., None]`."""

    codes: Array  # int8 [..., head_size]
    scale: Array  # float32 [...]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    window: int = 0,
    scale: float | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
) -> Array:
    """`softmax(scale * q @ k.T + mask) @ v` per head, in float32 and in one pass over the keys.

    q: [batch, heads, queries, head_size]; k, v: [batch, kv_heads, keys, head_size], where heads is a multiple
    of kv_heads (grouped queries). float32, float16 or (torch) bfloat16, k and v of the same dtype; or int8
    codes with k_scale and v_scale, float32 [batch, kv_heads, keys], as `quantize_kv` gives them. Strided
    views are read in place as long as the elements of a head lie side by side. All of one kind: numpy or
    torch.

    mask: broadcasts to [batch, heads, queries, keys]; boolean (true: may see) or floating point, to be added.
    causal: a query sees no key after its own. The last query stands at the last key, so that fewer queries
    than keys continue a cache; torch's is_causal puts the first query at the first key. window: a query sees
    that many keys up to and including its own position; 0: all. scale: 1 / sqrt(head_size) unless given.

    Returns [batch, heads, queries, head_size] of the dtype of q, in the memory order [batch, queries, heads,
    head_size], so that `.swapaxes(1, 2).reshape(...)` joins the heads without a copy. A query that may see no
    key gives zeros. A query's result does not depend on the other queries of the call, bit for bit. Not
    differentiable. Raises DTypeError (TypeError), ShapeError, DeviceError or ValueError.
    """
    kind = kind_of(q, "q")
    q_code = float_code(kind, q.dtype, "q")
    batch, heads, queries, head_size, kv_heads, keys = _sizes(kind, q, k, v)
    _not_recorded(kind, q=q, k=k, v=v, mask=mask)
    storage, scales = _storage(kind, k, v, k_scale, v_scale)
    window, scale = _window(window), 1 / math.sqrt(head_size) if scale is None else float(scale)
    q, q_strides = _strided(kind, q)
    k, k_strides = _strided(kind, k)
    v, v_strides = _strided(kind, v)
    mask, mask_code, mask_strides = _mask(kind, mask, (batch, heads, queries, keys))
    out = kind.empty((batch, queries, heads, head_size), q.dtype)
    with isa_errors:
        _core.attention(
            batch,
            queries,
            keys,
            heads,
            kv_heads,
            head_size,
            kind.pointer(q),
            q_strides,
            q_code,
            kind.pointer(k),
            k_strides,
            kind.pointer(v),
            v_strides,
            storage,
            *(argument for x, strides in scales for argument in (_pointer(kind, x), strides)),
            scale,
            causal,
            keys - queries,
            window,
            _pointer(kind, mask),
            mask_code,
            mask_strides,
            kind.pointer(out),
            (queries * heads * head_size, heads * head_size, head_size),
            q_code,
            kind.threads(),
        )
    return out.swapaxes(1, 2)


def quantize_kv(x: Array) -> QuantizedKV:
    """Keys or values x [..., head_size] -> int8 codes and one scale for each row, symmetric: `scale =
    max|row| / 127`. A row with a NaN or an infinity gets scale NaN and codes 0.
    """
    kind_of(x, "x")
    if x.ndim == 0:
        raise ShapeError("quantize_kv: x is a single number; its last dimension must be the head_size")
    shape = tuple(x.shape)
    rows = quantize_rows(x.reshape((math.prod(shape[:-1]), shape[-1])), symmetric=True)
    return QuantizedKV(rows.codes.reshape(shape), rows.scale.reshape(shape[:-1]))


def _sizes(kind: Kind, q: Array, k: Array, v: Array) -> tuple[int, ...]:
    """batch, heads, queries, head_size, kv_heads, keys; errors unless the shapes fit."""
    for what, x in (("k", k), ("v", v)):
        check_kind(kind, x, what, "q")
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    for what, shape in zip("qkv", shapes, strict=True):
        if len(shape) != 4:
            raise ShapeError(f"{what} has the shape {shape}; it must be [batch, heads, positions, head_size]")
    (batch, heads, queries, head_size), (k_batch, kv_heads, keys, k_size), _ = shapes
    if shapes[1] != shapes[2]:
        raise ShapeError(f"k has the shape {shapes[1]} and v {shapes[2]}; they must be equal")
    if (k_batch, k_size) != (batch, head_size):
        raise ShapeError(
            f"q has the shape {shapes[0]} and k {shapes[1]}; their batch and head_size must be equal"
        )
    if head_size == 0 or kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ShapeError(
            f"q has {heads} heads of {head_size} elements and k {kv_heads} heads: it must be a multiple, and "
            "none of them zero"
        )
    return batch, heads, queries, head_size, kv_heads, keys


def _not_recorded(kind: Kind, **operands: Array | None) -> None:
    if kind is NUMPY or not kind.torch.is_grad_enabled():
        return
    for what, x in operands.items():
        if getattr(x, "requires_grad", False):
            raise ValueError(
                f"attention: {what} requires a gradient, which this function does not record; call it under "
                "torch.no_grad()"
            )


def _pointer(kind: Kind, x: Array | None) -> int:
    return 0 if x is None else kind.pointer(x)


def _window(window: int) -> int:
    if isinstance(window, bool) or not hasattr(window, "__index__") or window.__index__() < 0:
        raise ValueError(f"window is {window!r}; it must be a number of keys, or 0 for all of them")
    return window.__index__()


def _storage(
    kind: Kind, k: Array, v: Array, k_scale: Array | None, v_scale: Array | None
) -> tuple[int, list[tuple[Array | None, tuple[int, ...]]]]:
    """The code of the storage of k and v, and each scale with its strides of a sequence, a key and a head."""
    if k.dtype != v.dtype:
        raise DTypeError(f"k has the dtype {k.dtype} and v {v.dtype}; they must be equal")
    if k.dtype != kind.int8:
        if k_scale is not None or v_scale is not None:
            raise ValueError(f"k_scale and v_scale are for int8 codes; k and v have the dtype {k.dtype}")
        return float_code(kind, k.dtype, "k"), [(None, (0, 0, 0))] * 2
    scales = []
    for what, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            raise ValueError(f"int8 keys and values need {what}: quantize_kv gives it")
        check_kind(kind, scale, what, "q")
        if scale.dtype != kind.float32 or tuple(scale.shape) != tuple(k.shape[:3]):
            raise (ShapeError if scale.dtype == kind.float32 else DTypeError)(
                f"{what} has the dtype {scale.dtype} and the shape {tuple(scale.shape)}; it must be float32 "
                f"{tuple(k.shape[:3])}, one for each row of k"
            )
        scale, (batch, head, key) = _placed(kind, scale)
        scales.append((scale, (batch, key, head)))
    return _INT8, scales


def _mask(
    kind: Kind, mask: Array | None, shape: tuple[int, ...]
) -> tuple[Array | None, int, tuple[int, ...]]:
    """The mask as the kernels read it, the code of its kind, and its strides, 0 where it broadcasts."""
    if mask is None:
        return None, 0, (0, 0, 0, 0)
    check_kind(kind, mask, "mask", "q")
    own = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(own) != 4 or any(size not in (1, whole) for size, whole in zip(own, shape, strict=True)):
        raise ShapeError(
            f"mask has the shape {tuple(mask.shape)}; it must broadcast to [batch, heads, queries, keys], "
            f"here {shape}"
        )
    code = _BOOLEAN if str(mask.dtype) in ("bool", "torch.bool") else _ADD
    if code == _ADD:
        if "float" not in str(mask.dtype):
            raise DTypeError(f"mask has the dtype {mask.dtype}; it must be boolean or floating point")
        if mask.dtype != kind.float32:
            mask = kind.cast(mask, kind.float32)
    mask, strides = _placed(kind, mask)
    strides = (0,) * (4 - mask.ndim) + strides
    if 0 in own:
        return None, 0, (0, 0, 0, 0)  # there is no key, or nothing to compute
    return mask, code, tuple(0 if size == 1 else stride for size, stride in zip(own, strides, strict=True))


def _strided(kind: Kind, x: Array) -> tuple[Array, tuple[int, int, int]]:
    """x [batch, heads, positions, head_size] and its strides of a batch, a position and a head."""
    x, (batch, head, row, _) = _placed(kind, x, side_by_side=True)
    return x, (batch, row, head)


def _placed(kind: Kind, x: Array, *, side_by_side: bool = False) -> tuple[Array, tuple[int, ...]]:
    """x and its strides in elements; a copy where they are no whole elements, or where those of the last
    dimension have to lie side by side and do not.
    """
    if kind is NUMPY:
        readable = x.flags.aligned and all(stride % x.itemsize == 0 for stride in x.strides)
        inner = not side_by_side or x.shape[-1] <= 1 or x.strides[-1] == x.itemsize
        x = x if readable and inner else x.copy()
        return x, tuple(stride // x.itemsize for stride in x.strides)
    strides = x.stride()
    if x.is_neg() or (side_by_side and strides[-1] != 1 and x.shape[-1] > 1):
        x = kind.cast(x, x.dtype)
        strides = x.stride()
    return x, strides
