"""Codes and scales of a weight matrix, found from its numbers alone: no calibration data, numpy only."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np

from .errors import SchemeError
from .quantized_tensor import NF4_CODES
from .scheme import Scheme

METHODS = ("absmax", "mse", "hqq")
DEFAULT_INT4 = "mse"

_TINY = np.float32(2.0**-100)  # a row of which max / 127 is below this counts as zeros, as in the kernels
_SMALLEST = np.float32(2.0**-24)  # the smallest positive float16
_CHUNK = 1 << 16  # elements a thread works on at a time: with its temporaries they stay in the L2 cache
_RATIOS = np.linspace(1.0, 0.4, 31, dtype=np.float32)[1:]  # scales that "mse" tries, in units of absmax's

# hqq: |error|^p with the p, first beta, growth of beta and rounds that its paper gives.
_P, _BETA, _KAPPA, _ROUNDS = np.float32(0.7), 10.0, 1.01, 20
_FLAT = np.float32(1e-4)  # |error|^(p - 1) is cut off below it


class _Grid(NamedTuple):
    """The values that a scheme's codes can take: integers low..high, or nf4's table."""

    low: int
    high: int
    kind: str  # "sym": q * s; "zero": (q - zero) * s; "minimum": q * s + b; "nf4": table[q] * s
    grouped: bool


def encode(weight: np.ndarray, scheme: Scheme, method: str, *, threads: int = 0) -> dict:
    """Quantize `weight` float32 [n, k], all finite, to the codes of `scheme`.

    method: "absmax" spans the range of each group (or row); "mse" searches the scale, and the zero point of
    an asymmetric scheme, of the least squared error; "hqq" searches a float offset of the least l_p error and
    needs an asymmetric scheme with groups. threads: 0 for one per processor; the result is always the same.

    Returns a dict: codes_unpacked [n, k] (uint8 0..15 for 4 bits, else int8), scale float32 [n], and each
    [n, groups] or None: group_scale float16, zero int8, minimum float16. They are the fields of a
    QuantizedTensor but for the packing of two 4-bit codes in a byte.

    Raises SchemeError for a method that is unknown or does not fit the scheme.
    """
    grid = _grid(scheme, method)
    n, k = weight.shape
    size = scheme.group or k
    groups = -(-k // size)
    out = {
        "codes_unpacked": np.empty((n, k), np.uint8 if scheme.weight_bits == 4 else np.int8),
        "scale": np.empty(n, np.float32),
        "group_scale": np.empty((n, groups), np.float16) if scheme.group else None,
        "zero": np.empty((n, groups), np.int8) if grid.kind == "zero" else None,
        "minimum": np.empty((n, groups), np.float16) if grid.kind == "minimum" else None,
    }
    step = max(1, _CHUNK // k)

    def run(start: int) -> None:
        rows = slice(start, start + step)
        _encode_rows(weight[rows], size, grid, method, {f: a[rows] for f, a in out.items() if a is not None})

    with ThreadPoolExecutor(threads or _processors()) as pool:
        list(pool.map(run, range(0, n, step)))
    return out


def _grid(scheme: Scheme, method: str) -> _Grid:
    if method not in METHODS:
        raise SchemeError(f"no method is called {method!r}; the methods are: {', '.join(METHODS)}")
    if method == "hqq" and not (scheme.asym and scheme.group):
        raise SchemeError(
            f'method "hqq" finds a float offset for each group, which {scheme} has no place for; give a '
            f'scheme such as w{scheme.weight_bits}a16_g64+asym, or method="mse"'
        )
    grouped = scheme.group > 0
    if scheme.nf4:
        return _Grid(0, 15, "nf4", grouped)
    if not scheme.asym:
        return _Grid(*((-8, 7) if scheme.weight_bits == 4 else (-127, 127)), "sym", grouped)
    kind = "minimum" if method == "hqq" else "zero"
    return _Grid(*((0, 15) if scheme.weight_bits == 4 else (-128, 127)), kind, grouped)


def _encode_rows(weight: np.ndarray, size: int, grid: _Grid, method: str, out: dict) -> None:
    """Encode rows float32 [r, k] in groups of `size` along k, into the slices of the result in `out`."""
    weight = np.asarray(weight, np.float32)
    r, k = weight.shape
    # Rows in units of a power of two, where they lie in [-1, 1] (or [-4, 4] next to the largest float32):
    # exact, and far from overflow and from subnormals.
    top = np.abs(weight).max(1)
    live = top / 127 >= _TINY
    exponent = np.clip(np.frexp(top)[1], -126, 126)
    unit = np.ldexp(np.float32(1), exponent)
    unit[~live] = 1
    w = weight / unit[:, None]
    w[~live] = 0
    whole = k // size * size
    blocks = [w[:, :whole].reshape(r, -1, size)] if whole else []
    if whole < k:
        blocks.append(w[:, None, whole:])

    spans = [_span(b, grid) for b in blocks]
    factor = _power_above(np.concatenate(spans, 1).max(1)) if grid.grouped else None
    fits = [_fit(b, s, factor, grid, method) for b, s in zip(blocks, spans, strict=True)]
    scale, offset = (np.concatenate(parts, 1) for parts in zip(*fits, strict=True))
    dead = np.concatenate([~b.any(2) for b in blocks], 1)
    if grid.grouped:
        # The largest scale may have shrunk. A smaller factor leaves float16 scales exact.
        factor = _power_above(np.where(dead, 0, scale).max(1))
        scale, offset = _rounded(scale, factor), _rounded_offset(offset, scale, factor, grid)
        group_scale = scale / factor[:, None]
        group_scale[dead] = 1
        out["group_scale"][:] = group_scale
        out["scale"][:] = factor * unit
        if grid.kind == "minimum":
            out["minimum"][:] = np.where(dead, 0, offset / factor[:, None])
    else:
        scale[dead] = 1
        out["scale"][:] = scale[:, 0] * unit
    if grid.kind == "zero":
        out["zero"][:] = offset
    start = 0
    for b in blocks:
        stop = start + b.shape[1]
        codes = _codes(b, scale[:, start:stop, None], offset[:, start:stop, None], grid)
        codes = codes + (8 if grid.low == -8 else 0)
        out["codes_unpacked"][:, start * size : start * size + codes[0].size] = codes.reshape(r, -1)
        start = stop


def _span(w: np.ndarray, grid: _Grid) -> np.ndarray:
    """The smallest scale float32 [r, g] with which no element of w [r, g, size] is out of the codes' range."""
    if grid.kind == "nf4":
        return np.abs(w).max(2) / np.float32(127)
    high, low = np.maximum(w.max(2), 0), np.minimum(w.min(2), 0)
    if grid.kind == "sym":
        return np.maximum(high / np.float32(grid.high), low / np.float32(grid.low))
    return (high - low) / np.float32(grid.high - grid.low)


def _power_above(largest: np.ndarray) -> np.ndarray:
    """2^ceil(log2(largest)), and 1 where it is 0: float32 [r]."""
    fraction, exponent = np.frexp(largest)
    power = np.ldexp(np.float32(1), exponent - (fraction == 0.5))
    return np.where(largest > 0, power, np.float32(1))


def _rounded(scale: np.ndarray, factor: np.ndarray | None) -> np.ndarray:
    """scale [r, g] as a float16 times factor [r]. Subnormals are rounded up, lest elements be clipped."""
    if factor is None:
        return np.where(scale > 0, scale, np.float32(1))
    part = scale / factor[:, None]
    up = np.maximum(np.ceil(part / _SMALLEST), 1) * _SMALLEST
    return np.where(part < 2.0**-14, up, part.astype(np.float16)).astype(np.float32) * factor[:, None]


def _rounded_offset(offset: np.ndarray, scale: np.ndarray, factor: np.ndarray, grid: _Grid) -> np.ndarray:
    if grid.kind != "minimum":
        return offset
    return (offset / factor[:, None]).astype(np.float16).astype(np.float32) * factor[:, None]


def _first_offset(w: np.ndarray, scale: np.ndarray, grid: _Grid) -> np.ndarray:
    """The offset [r, g] that puts the range of w at the ends of the codes: a zero point, or a minimum."""
    low = np.minimum(w.min(2), 0)
    if grid.kind == "zero":
        return np.clip(np.rint(grid.low - low / scale), grid.low, grid.high)
    return low - grid.low * scale if grid.kind == "minimum" else np.zeros_like(scale)


def _codes(w: np.ndarray, scale: np.ndarray, offset: np.ndarray, grid: _Grid) -> np.ndarray:
    """The codes nearest to w [r, g, size], given scale and offset [r, g, 1]: float32, or uint8 for nf4."""
    if grid.kind == "nf4":
        halves = np.clip(w * (2 / scale), -254, 254)
        halves += 254
        return _nf4()[1][halves.astype(np.uint16)]
    q = (w - offset) * (1 / scale) if grid.kind == "minimum" else w * (1 / scale)
    np.rint(q, out=q)
    if grid.kind == "zero":
        q += offset
    return np.clip(q, grid.low, grid.high, out=q)


def _values(codes: np.ndarray, scale: np.ndarray, offset: np.ndarray, grid: _Grid) -> np.ndarray:
    """What codes [r, g, size] stand for; `codes` may be overwritten."""
    if grid.kind == "nf4":
        return _nf4()[0][codes] * scale
    if grid.kind == "zero":
        codes -= offset
    codes *= scale
    if grid.kind == "minimum":
        codes += offset
    return codes


@cache
def _nf4() -> tuple[np.ndarray, np.ndarray]:
    """NF4's 16 values as float32, and the code nearest to each half integer h / 2 at index h + 254.

    Halfway points between two integer levels are half integers, so all of [h / 2, (h + 1) / 2) has one code.
    """
    table = np.asarray(NF4_CODES, np.float32)
    middles = (table[1:] + table[:-1]) / 2
    return table, np.searchsorted(middles, np.arange(-254, 256) / 2, side="right").astype(np.uint8)


def _fit(
    w: np.ndarray, span: np.ndarray, factor: np.ndarray | None, grid: _Grid, method: str
) -> tuple[np.ndarray, np.ndarray]:
    """scale and offset [r, g] of the groups w [r, g, size]; span: the scales of the whole range."""
    scale = _rounded(span, factor)
    offset = _rounded_offset(_first_offset(w, scale, grid), scale, factor, grid)
    if method == "absmax":
        return scale, offset
    if method == "hqq":
        return scale, _half_quadratic(w, scale, offset, factor, grid)
    best = _error(w, scale, offset, grid)
    shifts = (0, -1, 1) if grid.kind == "zero" else (0,)
    for ratio in _RATIOS:
        trial = _rounded(span * ratio, factor)
        first = _first_offset(w, trial, grid)
        for shift in shifts:
            moved = np.clip(first + shift, grid.low, grid.high) if shift else first
            error = _error(w, trial, moved, grid)
            better = error < best
            best = np.where(better, error, best)
            scale, offset = np.where(better, trial, scale), np.where(better, moved, offset)
    return scale, offset


def _half_quadratic(
    w: np.ndarray, scale: np.ndarray, offset: np.ndarray, factor: np.ndarray, grid: _Grid
) -> np.ndarray:
    """The offset [r, g] of the least sum |error|^p that half-quadratic splitting meets: Badri and Shaji 2023.

    It splits the error e of each weight into an outlier part o and the rest, min sum |o|^p + beta/2 (o - e)^2,
    and solves for one of the two at a time: o = shrink(e), then the offset with the least squares of e - o,
    which is a mean. Errors are in steps of the group's scale, so that beta suits weights of any size.
    """
    step, beta = scale[..., None], _BETA
    best, least = offset, None
    for _ in range(_ROUNDS):
        residue = _codes(w, step, offset[..., None], grid)
        residue *= -step
        residue += w
        error = (residue - offset[..., None]) / step
        size = np.abs(error)
        root = np.maximum(size, _FLAT) ** (_P - 1)
        cost = np.einsum("rgk,rgk->rg", root, size)
        better = cost < (np.inf if least is None else least)
        best, least = np.where(better, offset, best), cost if least is None else np.minimum(cost, least)
        outlier = np.copysign(np.maximum(size - root / beta, 0), error)
        outlier *= step
        residue -= outlier
        offset = _rounded_offset(residue.mean(2), scale, factor, grid)
        beta *= _KAPPA
    return best


def _error(w: np.ndarray, scale: np.ndarray, offset: np.ndarray, grid: _Grid) -> np.ndarray:
    """The sum of squared errors of each group: float32 [r, g]."""
    scale, offset = scale[..., None], offset[..., None]
    e = _values(_codes(w, scale, offset, grid), scale, offset, grid)
    e -= w
    return np.einsum("rgk,rgk->rg", e, e)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
