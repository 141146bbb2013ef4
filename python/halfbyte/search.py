"""Codes and scales of a weight matrix, found from its numbers alone: no calibration data, numpy only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np

from .errors import SchemeError
from .quantized_tensor import NF4_CODES
from .scheme import Scheme

METHODS = ("absmax", "mse", "weighted", "hqq")
DEFAULT_INT4 = "weighted"

_TINY = np.float32(2.0**-100)  # a row of which max / 127 is below this counts as zeros, as in the kernels
_SMALLEST = np.float32(2.0**-24)  # the smallest positive float16
_CHUNK = 1 << 16  # elements a thread works on at a time: with its temporaries they stay in the L2 cache
_RATIOS = np.linspace(1.0, 0.4, 31, dtype=np.float32)[1:]  # scales that are tried, in units of absmax's
_CUTS = (0.0, 0.04, 0.08, 0.13, 0.19, 0.26)  # parts of the range that are cut off at either end, to try
_REGRESSIONS = 3  # rounds of codes, then the best line through them
_EVEN = 32.0  # importances of columns lie within this factor of their median

# hqq: |error|^p with the p, first beta, growth of beta and rounds that its authors use.
_P, _BETA, _KAPPA, _ROUNDS = np.float32(0.7), 10.0, 1.01, 20
_FLAT = np.float32(1e-4)  # |error|^(p - 1) is cut off below this many steps


class _Grid(NamedTuple):
    """The values that a scheme's codes can take: integers low..high, or nf4's table."""

    low: int
    high: int
    kind: str  # "sym": q * s; "zero": (q - zero) * s; "minimum": q * s + b; "nf4": table[q] * s


class _Groups(NamedTuple):
    """Groups of equal size from some rows, and what is the same for all fits to them."""

    w: np.ndarray  # float32 [r, g, size]
    grid: _Grid
    factor: np.ndarray | None  # float32 [r], powers of two: scales are float16 times these; None: any float32
    root: np.ndarray | None  # float32 [g, size], by which errors are multiplied before they are squared


def encode(weight: np.ndarray, scheme: Scheme, method: str, *, threads: int = 0) -> dict:
    """Quantize `weight` float32 [n, k], all finite, to the codes of `scheme`.

    method:
    - "absmax" spans the range of each group (or row).
    - "mse" searches the scale, and the zero point of an asymmetric scheme, of the least squared error.
    - "weighted" does so with squared errors weighted by the likely importance of their input features (see
      `importance`); an asymmetric scheme with groups gets float minimums.
    - "hqq" keeps the scale of absmax and searches the float minimum of the least l_p error (Badri and Shaji
      2023); only for asymmetric schemes with groups.
    threads: 0 for one per processor; the result is always the same.

    Returns a dict: codes_unpacked [n, k] (uint8 0..15 for 4 bits, else int8), scale float32 [n], and each
    [n, groups] or None: group_scale float16, zero int8, minimum float16. They are the fields of a
    QuantizedTensor but for the packing of two 4-bit codes in a byte.

    Raises SchemeError for a method that is unknown or does not fit the scheme.
    """
    grid = _grid(scheme, method)
    n, k = weight.shape
    size, groups = scheme.group or k, scheme.groups(k)
    out = {
        "codes_unpacked": np.empty((n, k), np.uint8 if scheme.weight_bits == 4 else np.int8),
        "scale": np.empty(n, np.float32),
        "group_scale": np.empty((n, groups), np.float16) if scheme.group else None,
        "zero": np.empty((n, groups), np.int8) if grid.kind == "zero" else None,
        "minimum": np.empty((n, groups), np.float16) if grid.kind == "minimum" else None,
    }
    root = np.sqrt(importance(weight)) if method == "weighted" else None
    step = max(1, _CHUNK // k)

    def run(start: int) -> None:
        rows = slice(start, start + step)
        parts = {field: array[rows] for field, array in out.items() if array is not None}
        _encode_rows(np.asarray(weight[rows], np.float32), size, grid, method, root, parts)

    with ThreadPoolExecutor(threads or _processors()) as pool:
        list(pool.map(run, range(0, n, step)))
    return out


def importance(weight: np.ndarray) -> np.ndarray:
    """How much errors in each column of `weight` [n, k] are likely to matter: float32 [k], the median 1.

    What matters is the mean square of the input feature, which the weights alone do not tell. But columns
    that meet large features have small weights, and among these a few large ones. So the guess is
    (rms / mean |w|)^5 / mean |w|. Its exponents 5 and 1 lie between those that fit the activations of a
    language model (SmolLM2-135M: 7.2 and 0.4) and of an encoder (MiniLM-L6: 2.4 and 1.6).
    """
    step = max(1, _CHUNK // weight.shape[1])
    total = square = 0.0
    for start in range(0, weight.shape[0], step):
        size = np.abs(weight[start : start + step], dtype=np.float64)
        total, square = total + size.sum(0), square + np.einsum("nk,nk->k", size, size)
    mean, power = total / weight.shape[0], square / weight.shape[0]
    live = mean > 0
    if not live.any():
        return np.ones(weight.shape[1], np.float32)
    # Logarithms: the powers themselves would overflow.
    mean, power = np.where(live, mean, 1), np.where(live, power, 1)
    log = 2.5 * np.log(power) - 6 * np.log(mean)
    log = np.where(live, log - np.median(log[live]), 0)
    return np.exp(np.clip(log, -np.log(_EVEN), np.log(_EVEN))).astype(np.float32)


def _grid(scheme: Scheme, method: str) -> _Grid:
    if method not in METHODS:
        raise SchemeError(f"no method is called {method!r}; the methods are: {', '.join(METHODS)}")
    if method == "hqq" and not (scheme.asym and scheme.group):
        raise SchemeError(
            f'method "hqq" finds a float offset for each group, which {scheme} has no place for; give a '
            f'scheme such as w{scheme.weight_bits}a16_g64+asym, or method="weighted"'
        )
    if scheme.nf4:
        return _Grid(0, 15, "nf4")
    if not scheme.asym:
        return _Grid(*((-8, 7) if scheme.weight_bits == 4 else (-127, 127)), "sym")
    kind = "minimum" if scheme.group and method in ("weighted", "hqq") else "zero"
    return _Grid(*((0, 15) if scheme.weight_bits == 4 else (-128, 127)), kind)


def _encode_rows(
    weight: np.ndarray, size: int, grid: _Grid, method: str, root: np.ndarray | None, out: dict
) -> None:
    """Encode rows float32 [r, k] in groups of `size` along k, into the slices of the result in `out`."""
    r, k = weight.shape
    # Rows in units of a power of two, where they lie in [-1, 1] (in [-4, 4] next to the largest float32):
    # exact, and far from overflow and from subnormals.
    top = np.abs(weight).max(1)
    live = top / 127 >= _TINY
    unit = np.where(live, np.ldexp(np.float32(1), np.clip(np.frexp(top)[1], -126, 126)), np.float32(1))
    w = np.where(live[:, None], weight / unit[:, None], np.float32(0))
    factor = _power_above(_span(w[:, None], grid)[:, 0]) if "group_scale" in out else None

    whole = k // size * size  # the groups of full size, then a shorter one
    pieces = [p for p in (slice(0, whole), slice(whole, k)) if p.stop > p.start]
    blocks = []
    for piece in pieces:
        g = max(1, (piece.stop - piece.start) // size)
        part = None if root is None else root[piece].reshape(g, -1)
        blocks.append(_Groups(np.ascontiguousarray(w[:, piece]).reshape(r, g, -1), grid, factor, part))
    fits = [_fit(block, method) for block in blocks]
    scale, offset = (np.concatenate(parts, 1) for parts in zip(*fits, strict=True))
    dead = np.concatenate([~block.w.any(2) for block in blocks], 1)
    if grid.kind == "minimum":
        offset[dead] = 0

    done = 0
    for piece, block in zip(pieces, blocks, strict=True):
        g = slice(done, done + block.w.shape[1])
        codes = _codes(block.w, scale[:, g], offset[:, g], grid)
        codes = codes + (8 if grid.low == -8 else 0)
        out["codes_unpacked"][:, piece] = codes.reshape(r, -1)
        done = g.stop
    if factor is None:
        out["scale"][:] = np.where(dead, 1, scale)[:, 0] * unit
    else:
        # Scales may have come out smaller: a smaller factor leaves what is a float16 with `factor` one.
        factor = _power_above(np.where(dead, 0, scale).max(1))
        out["group_scale"][:] = np.where(dead, 1, scale / factor[:, None])
        out["scale"][:] = factor * unit
    if grid.kind == "minimum":
        out["minimum"][:] = offset / factor[:, None]
    elif grid.kind == "zero":
        out["zero"][:] = offset


def _span(w: np.ndarray, grid: _Grid) -> np.ndarray:
    """The smallest scale [r, g] whose codes reach every element of w [r, g, size] and zero."""
    if grid.kind == "nf4":
        return np.abs(w).max(2) / np.float32(127)
    low, high = _range(w)
    if grid.kind == "sym":
        return np.maximum(high / np.float32(grid.high), low / np.float32(grid.low))
    return (high - low) / np.float32(grid.high - grid.low)


def _range(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.minimum(w.min(2), 0), np.maximum(w.max(2), 0)


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


def _rounded_minimum(minimum: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """minimum [r, g] as a float16 times factor [r]."""
    return (minimum / factor[:, None]).astype(np.float16).astype(np.float32) * factor[:, None]


def _codes(w: np.ndarray, scale: np.ndarray, offset: np.ndarray, grid: _Grid) -> np.ndarray:
    """The codes nearest to w [r, g, size] for scale and offset [r, g]: float32, or uint8 for nf4."""
    scale, offset = scale[..., None], offset[..., None]
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
    scale, offset = scale[..., None], offset[..., None]
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


def _fit(block: _Groups, method: str) -> tuple[np.ndarray, np.ndarray]:
    """scale and offset [r, g] of some groups; the offset is the zero point or the minimum, if any."""
    span = _span(block.w, block.grid)
    scale, offset = _placed(block, span, _range(block.w)[0])
    if method == "absmax":
        return scale, offset
    if method == "hqq":
        return scale, _half_quadratic(block, scale, offset)
    least = _error(block, scale, offset)

    def keep_better(trial: tuple[np.ndarray, np.ndarray]) -> None:
        nonlocal scale, offset, least
        error = _error(block, *trial)
        better = error < least
        least = np.where(better, error, least)
        scale, offset = np.where(better, trial[0], scale), np.where(better, trial[1], offset)

    for trial in _trials(block, span):
        keep_better(trial)
    if block.grid.kind == "minimum":
        for _ in range(_REGRESSIONS):
            keep_better(_regression(block, scale, offset, span))
    return scale, offset


def _placed(block: _Groups, scale: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`scale` as it can be stored, and the offset that gives `low` the lowest code."""
    grid = block.grid
    scale = _rounded(scale, block.factor)
    if grid.kind == "zero":
        return scale, np.clip(np.rint(grid.low - low / scale), grid.low, grid.high)
    if grid.kind == "minimum":
        return scale, _rounded_minimum(low - grid.low * scale, block.factor)
    return scale, np.zeros_like(scale)


def _trials(block: _Groups, span: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scales and offsets to try. They cut off a part of the range: at both ends, or with a float minimum at
    each end its own part. Zero points are tried one lower and higher, too.
    """
    grid, low = block.grid, _range(block.w)[0]
    if grid.kind == "minimum":
        width = span * (grid.high - grid.low)
        for below in _CUTS:
            for above in _CUTS:
                yield _placed(block, span * np.float32(1 - below - above), low + width * np.float32(below))
        return
    for ratio in _RATIOS:
        scale, offset = _placed(block, span * ratio, low * ratio)
        yield scale, offset
        if grid.kind == "zero":
            for shift in (-1, 1):
                yield scale, np.clip(offset + np.float32(shift), grid.low, grid.high)


def _error(block: _Groups, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """The sum of the (weighted) squared errors of each group: float32 [r, g]."""
    error = _values(_codes(block.w, scale, offset, block.grid), scale, offset, block.grid)
    error -= block.w
    if block.root is not None:
        error *= block.root
    return np.einsum("rgk,rgk->rg", error, error)


def _regression(
    block: _Groups, scale: np.ndarray, offset: np.ndarray, span: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The scale and minimum of the least squared error while the codes stay as they are: the line through
    (code, weight). As before where codes are all the same, or the line falls, or is steeper than `span`.
    """
    weight = np.float32(1) if block.root is None else np.square(block.root)
    total = np.broadcast_to(weight, block.w.shape[1:]).sum(1)
    q = _codes(block.w, scale, offset, block.grid)
    middle_q, middle_w = (q * weight).sum(2) / total, (block.w * weight).sum(2) / total
    q -= middle_q[..., None]
    slope, square = (q * weight * block.w).sum(2), (q * weight * q).sum(2)
    good = (slope > 0) & (slope <= span * square)
    line = _rounded(np.where(good, slope / np.where(good, square, 1), scale), block.factor)
    return line, np.where(good, _rounded_minimum(middle_w - middle_q * line, block.factor), offset)


def _half_quadratic(block: _Groups, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """The minimum [r, g] of the least sum |error|^p that half-quadratic splitting meets (Badri, Shaji 2023).

    It splits the error e of each weight into an outlier o and the rest, min sum |o|^p + beta/2 (o - e)^2, and
    solves for one of the two at a time: o = shrink(e), then the minimum with the least squares of e - o,
    which is a mean. Errors are in steps of the group's scale, so that beta suits weights of any size.
    """
    step, beta = scale[..., None], _BETA
    best, least = offset, np.full(scale.shape, np.inf, np.float32)
    for _ in range(_ROUNDS):
        rest = _codes(block.w, scale, offset, block.grid)
        rest *= -step
        rest += block.w
        error = (rest - offset[..., None]) / step
        size = np.abs(error)
        power = np.maximum(size, _FLAT) ** (_P - 1)
        cost = np.einsum("rgk,rgk->rg", power, size)
        best, least = np.where(cost < least, offset, best), np.minimum(cost, least)
        outlier = np.copysign(np.maximum(size - power / beta, 0), error)
        outlier *= step
        rest -= outlier
        offset = _rounded_minimum(rest.mean(2), block.factor)
        beta *= _KAPPA
    return best


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
