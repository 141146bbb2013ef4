"""The arithmetic of int8 quantization once more, in numpy alone and independent of halfbyte.reference.

It checks the reference itself and stands in for it where torch is absent (numpy only, under qemu).
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

F32 = np.float32
TINY = F32(2.0**-100)  # below it a scale is replaced by 1: its inverse would leave float32


def quantize_weight(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float [n,k] -> codes int8 [n,k], scale float32 [n], sums int32 [n]; symmetric, per row."""
    w = np.asarray(w, F32)
    codes, scale = np.zeros(w.shape, np.int8), np.ones(len(w), F32)
    for i, row in enumerate(w):
        amax = np.abs(row).max(initial=F32(0))
        if not np.isfinite(amax):
            scale[i] = np.nan
        elif amax / F32(127) >= TINY:
            scale[i] = amax / F32(127)
            codes[i] = np.clip(np.rint(row * (F32(1) / scale[i])), -127, 127)
    return codes, scale, codes.sum(1, dtype=np.int32)


def quantize_rows(x: np.ndarray, static: tuple[float, int] | None = None):
    """float [m,k] -> codes int8 [m,k], scale float32 [m], zero and sums int32 [m]; asymmetric, per row."""
    x = np.asarray(x, F32)
    codes, scale, zero = np.zeros(x.shape, np.int8), np.ones(len(x), F32), np.zeros(len(x), np.int32)
    for i, row in enumerate(x):
        lo, hi = row.min(initial=F32(0)), row.max(initial=F32(0))
        if not np.isfinite(row).all():
            scale[i] = np.nan
            continue
        if static is None:
            s = F32(hi / F32(255)) - F32(lo / F32(255))
            if s < TINY:
                continue
            inv = F32(1) / s
            z = int(np.clip(np.rint(-(lo * inv)) - 128, -128, 127))
        else:
            s, z = F32(static[0]), static[1]
            inv = F32(1) / s
        with np.errstate(over="ignore"):  # a static scale may be far too small for the row: it saturates
            q = np.clip(np.rint(row * inv), -(2.0**24), 2.0**24)
        codes[i], scale[i], zero[i] = np.clip(q + z, -128, 127), s, z
    return codes, scale, zero, codes.sum(1, dtype=np.int32)


def accumulate(codes_x: np.ndarray, zero: np.ndarray, codes_w: np.ndarray) -> np.ndarray:
    """sum_k (qx - z) qw as int64 [m,n]; float64 products and sums of these integers are exact."""
    return ((codes_x.astype(np.float64) - zero[:, None]) @ codes_w.astype(np.float64).T).astype(np.int64)


def linear(
    x: np.ndarray,
    codes_w: np.ndarray,
    scale_w: np.ndarray,
    bias: np.ndarray | None = None,
    static: tuple[float, int] | None = None,
) -> np.ndarray:
    """float32 [m,n]: (float32(acc) * scale_w[n]) * scale_x[m] (+ bias[n]), each step rounded to float32."""
    codes, scale, zero, _ = quantize_rows(x, static)
    with np.errstate(over="ignore"):
        y = (accumulate(codes, zero, codes_w).astype(F32) * scale_w[None, :]) * scale[:, None]
    return y if bias is None else y + bias[None, :]


def round_fraction(value: Fraction) -> np.float32:
    """The float32 nearest to a fraction below 2^127 in size, ties to even."""
    near = F32(float(value))
    around = (np.nextafter(near, F32(-np.inf)), near, np.nextafter(near, F32(np.inf)))
    return min(around, key=lambda f: (abs(Fraction(float(f)) - value), int(f.view(np.uint32)) & 1))


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once: by way of float64, but by fractions where that ends in a tie."""
    a, b, c = np.broadcast_arrays(a, b, c)
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.asarray(a.astype(np.float64) * b + c)
        out = near.astype(F32)
    # Halfway between two float32 the 29 bits that float64 has more are 100...0; subnormals have fewer.
    tie = (near.view(np.int64) & (2**29 - 1) == 2**28) | ((np.abs(near) < 2.0**-125) & (near != 0))
    for at in np.argwhere(tie & np.isfinite(out)):
        i = tuple(at)
        out[i] = round_fraction(Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i])))
    return out


def quantize_groups(x: np.ndarray, group: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """float [m,k] -> codes int64 [m,k], scale float32 [m, groups]; symmetric, per row and group."""
    x = np.asarray(x, F32)
    m, k = x.shape
    codes, scale = np.zeros((m, k), np.int64), np.ones((m, -(-k // group)), F32)
    for i in range(m):
        for g in range(scale.shape[1]):
            part = x[i, g * group : (g + 1) * group]
            amax = np.abs(part).max()
            if not np.isfinite(amax):
                scale[i, g] = np.nan
            elif amax / F32(limit) >= TINY:
                scale[i, g] = amax / F32(limit)
                q = np.rint(part * (F32(1) / scale[i, g]))
                codes[i, g * group : (g + 1) * group] = np.clip(q, -limit, limit)
    return codes, scale


def linear_grouped(
    x: np.ndarray,
    c: np.ndarray,
    scale: np.ndarray,
    group: int,
    activations: str,
    group_scale: np.ndarray | None = None,
    zero: np.ndarray | None = None,
    minimum: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    static: tuple[float, int] | None = None,
) -> np.ndarray:
    """float32 [m,n] for integers c [n,k] and what belongs to their groups of k, each [n, groups].

    activations: "token", or "int8" and "int16" for a symmetric scale per group. Without parts of the weight
    per group the group is that of the activations, or k.
    """
    n, k = c.shape
    if activations == "token":
        qx, sx, zx, _ = quantize_rows(x, static)
    else:
        qx, sx = quantize_groups(x, group, {"int8": 127, "int16": 32639}[activations])
    edges = [(first, min(first + group, k)) for first in range(0, k, group)]
    spread = {} if zero is None else {"zero": zero[:, [0] * len(edges)] if zero.shape[1] == 1 else zero}
    t, total = np.zeros((len(x), n), F32), np.zeros(n)
    for g, (first, end) in enumerate(edges):
        integers = c[:, first:end].astype(np.int64)
        if spread:
            integers = integers - spread["zero"][:, g, None]
        products = np.array([[int(row @ w) for w in integers] for row in qx[:, first:end].astype(np.int64)])
        p = products.reshape(len(x), n).astype(F32)
        a = None if activations == "token" else sx[:, g, None]
        w = None if group_scale is None else group_scale[:, g].astype(F32)
        with np.errstate(over="ignore", invalid="ignore"):
            if w is not None and a is not None:
                p = p * w
            last = a if a is not None else w
            t = t + p if last is None else fma(p, last, t)
            share = integers.sum(1).astype(np.float64)
            if w is not None:
                share = share * w
            if minimum is not None:
                s = qx[:, first:end].sum(1, dtype=np.int64).astype(F32)[:, None]
                t = fma(s if a is None else s * a, minimum[:, g].astype(F32), t)
                share = share + (end - first) * minimum[:, g].astype(np.float64)
        total = total + share
    with np.errstate(over="ignore", invalid="ignore"):
        if activations == "token":
            t = t - zx.astype(F32)[:, None] * total.astype(F32)
        y = t * scale
        if activations == "token":
            y = y * sx[:, None]
    return y if bias is None else y + bias[None, :]
