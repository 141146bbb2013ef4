"""Calls of halfbyte._core with operands placed in guarded memory: any layout, every stray write is seen."""

from __future__ import annotations

import numpy as np
import torch

from halfbyte import _core

CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3}
ACTIVATION = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
GUARD = 64  # elements before and after every operand


class Placed:
    """A matrix [rows, cols] in a larger buffer whose other bytes are a sentinel (NaN to a float reader)."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype, layout: str = "dense"):
        pad = 5 if layout in ("padded", "both") else 0
        skew = 1 if layout in ("unaligned", "both") else 0
        self.ld = cols + pad
        size = dtype.itemsize
        raw = torch.full(((2 * GUARD + rows * self.ld + 64) * size + 64,), 0xFF, dtype=torch.uint8)
        start = -raw.data_ptr() % 64
        body = raw[start : start + (raw.numel() - start) // size * size].view(dtype)
        self._raw, self._bytes = raw, (start + (GUARD + skew) * size, rows, cols, size)
        self.view = torch.as_strided(body, (rows, cols), (max(self.ld, 1), 1), GUARD + skew)

    @property
    def ptr(self) -> int:
        return self.view.data_ptr()

    def fill(self, values: torch.Tensor) -> Placed:
        self.view.copy_(values)
        return self

    def check(self) -> torch.Tensor:
        """The matrix, after a check that nothing around it changed."""
        start, rows, cols, size = self._bytes
        inside = np.zeros(self._raw.numel(), bool)
        for i in range(rows):
            at = start + i * self.ld * size
            inside[at : at + cols * size] = True
        stray = (self._raw.numpy() != 0xFF) & ~inside
        assert not stray.any(), f"wrote outside the output, first at byte {int(stray.argmax()) - start}"
        return self.view.clone()


def place(values: torch.Tensor, layout: str = "dense") -> Placed:
    return Placed(*values.shape, values.dtype, layout).fill(values)


def pack(codes: torch.Tensor, scale: torch.Tensor, layout: str = "dense"):
    w = place(codes, layout)
    return _core.pack_linear_w8a8(w.ptr, codes.shape[0], codes.shape[1], w.ld, scale.contiguous().data_ptr())


def unpack(packed, layout: str = "dense") -> torch.Tensor:
    out = Placed(packed.n, packed.k, torch.int8, layout)
    _core.unpack_linear_w8a8(packed, out.ptr, out.ld)
    return out.check()


def quantize_rows(x, *, symmetric=False, static=None, layout="dense", threads=1):
    """codes int8 [m,k], scale float32 [m], zero int32 [m], sums int32 [m] of one call of the core."""
    m, k = x.shape
    a, codes = place(x, layout), Placed(m, k, torch.int8, layout)
    scale, zero, sums = Placed(1, m, torch.float32), Placed(1, m, torch.int32), Placed(1, m, torch.int32)
    s, z = static or (0.0, 0)
    _core.quantize_rows(
        m,
        k,
        a.ptr,
        a.ld,
        CODE[x.dtype],
        codes.ptr,
        codes.ld,
        scale.ptr,
        0 if symmetric else zero.ptr,
        sums.ptr,
        symmetric,
        s,
        z,
        threads,
    )
    zeros = torch.zeros(m, dtype=torch.int32) if symmetric else zero.check()[0]
    return codes.check(), scale.check()[0], zeros, sums.check()[0]


def linear(
    packed,
    x,
    *,
    bias=None,
    activation="none",
    residual=None,
    out_dtype=None,
    static=None,
    layout="dense",
    threads=1,
) -> torch.Tensor:
    """y [m,n] of one call of the core, its operands placed as the layout says."""
    m, k = x.shape
    assert k == packed.k
    a, c = place(x, layout), Placed(m, packed.n, out_dtype or x.dtype, layout)
    b = place(bias[None], layout) if bias is not None else None
    r = place(residual, layout) if residual is not None else None
    s, z = static or (0.0, 0)
    _core.linear_w8a8(
        packed,
        m,
        a.ptr,
        a.ld,
        CODE[x.dtype],
        c.ptr,
        c.ld,
        CODE[c.view.dtype],
        b.ptr if b else 0,
        ACTIVATION[activation],
        r.ptr if r else 0,
        r.ld if r else 0,
        CODE[residual.dtype] if r else 0,
        s,
        z,
        threads,
    )
    return c.check()


def same(got: torch.Tensor, want: torch.Tensor, what: str = "output") -> None:
    """Equal bit for bit, except that any NaN equals any NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{what}: {got.dtype}{tuple(got.shape)} is not {want.dtype}{tuple(want.shape)}"
    )
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    differ = got.contiguous().view(bits) != want.contiguous().view(bits)
    if got.dtype.is_floating_point:
        differ &= ~(got.isnan() & want.isnan())
    if differ.any():
        at = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.numel()} differ, first at {at}: "
            f"{got[at].item()!r} instead of {want[at].item()!r}"
        )
