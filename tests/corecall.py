"""Calls of halfbyte._core with operands placed in guarded memory: any layout, every stray write is seen."""

from __future__ import annotations

import numpy as np
import torch

import halfbyte as hb
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


def pack(q: hb.QuantizedTensor, layout: str = "dense", threads: int = 0):
    """The core's pack of a weight of torch tensors, its codes placed as the layout says, the rest dense."""
    codes = place(q.codes, layout)
    skew = "unaligned" if layout in ("unaligned", "both") else "dense"
    rest = {what: getattr(q, what) for what in ("group_scale", "zero", "minimum")}
    rest = {what: place(part, skew) for what, part in rest.items() if part is not None}
    scale = place(q.scale[None], skew)
    return _core.pack_linear(
        q.scheme.op,
        codes.ptr,
        *q.shape,
        codes.ld,
        scale.ptr,
        group=q.scheme.group,
        group_scale_type=0 if q.group_scale is None else CODE[q.group_scale.dtype],
        nf4=q.scheme.nf4,
        activation_group=q.scheme.activation_group,
        threads=threads,
        **{what: part.ptr for what, part in rest.items()},
    )


def unpack(packed, layout: str = "dense") -> torch.Tensor:
    """The codes as they were packed: int8 [n, k], or bytes [n, ceil(k / 2)] of nibbles."""
    four = packed.op.startswith("linear_w4")
    columns, dtype = ((packed.k + 1) // 2, torch.uint8) if four else (packed.k, torch.int8)
    out = Placed(packed.n, columns, dtype, layout)
    _core.unpack_linear(packed, out.ptr, out.ld)
    return out.check()


def quantize_rows(x, *, symmetric=False, static=None, group=0, wide=False, layout="dense", threads=1):
    """codes int8 [m, k] (wide: int16), scale float32 [m], zero int32 [m], sums int32 [m] of one call of the
    core; with a group, which is symmetric, scale, zero and sums are [m, groups].
    """
    m, k = x.shape
    groups = -(-k // group) if group else 1
    symmetric = symmetric or group > 0
    a, codes = place(x, layout), Placed(m, k, torch.int16 if wide else torch.int8, layout)
    scale, zero = Placed(1, m * groups, torch.float32), Placed(1, m, torch.int32)
    sums = Placed(1, m * groups, torch.int32)
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
        group,
        wide,
        threads,
    )
    shape = (m, groups) if group else (m,)
    zeros = torch.zeros(shape, dtype=torch.int32) if symmetric else zero.check()[0]
    return codes.check(), scale.check().view(shape), zeros, sums.check().view(shape)


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
    _core.linear(
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
