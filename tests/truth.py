"""The arithmetic of int8 quantization once more, in numpy alone and independent of halfbyte.reference.

It checks the reference itself and stands in for it where torch is absent (numpy only, under qemu).
"""

from __future__ import annotations

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
